//! Answers that this proxy gives itself, each with the reason.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;

/// Names the reason, in Envoy's response flags.
const FLAG: &str = "x-mesh-redirect-flag";

/// Why a request could not be answered by an endpoint.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The request names no host and went nowhere in particular.
    #[error("the request has no Host, and the connection was not steered here")]
    NoHost,
    /// The host is in no virtual host and the request went nowhere in particular.
    #[error("no virtual host has the domain `{0}`, and the connection was not steered here")]
    NoRoute(String),
    /// The request would come back to this proxy.
    #[error("the request leads back to this proxy")]
    Loop,
    /// No endpoint accepted a connection.
    #[error("no endpoint of cluster `{0}` accepts connections")]
    NoConnection(String),
    /// The endpoint ended the connection before it answered.
    #[error("the endpoint ended the connection before it answered: {0}")]
    Ended(hyper::Error),
    /// The endpoint's answer cannot be passed on.
    #[error("the endpoint answered in a transfer coding other than chunked")]
    BadAnswer,
    /// The request's target cannot be sent on.
    #[error("the request's target cannot be sent on")]
    BadTarget,
    /// Which of them counts is anybody's guess (RFC 9112 §3.2).
    #[error("the request has more than one Host")]
    ManyHosts,
    /// The request's body cannot be passed on.
    #[error("the request is in a transfer coding other than chunked")]
    BadCoding,
    /// The client broke off, or what it sent is no body.
    #[error("the request's body ended early or is malformed")]
    BadBody,
}

impl Failure {
    /// The reason, in Envoy's response flags.
    pub(super) fn flag(&self) -> &'static str {
        match self {
            Self::NoHost | Self::NoRoute(_) | Self::Loop => "NR",
            Self::NoConnection(_) => "UF",
            Self::Ended(_) => "UC",
            Self::BadAnswer => "UPE",
            Self::BadTarget | Self::ManyHosts | Self::BadCoding | Self::BadBody => "DPE",
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::NoHost | Self::BadTarget | Self::ManyHosts | Self::BadBody => StatusCode::BAD_REQUEST,
            Self::BadCoding => StatusCode::NOT_IMPLEMENTED,
            Self::NoRoute(_) => StatusCode::NOT_FOUND,
            Self::Loop => StatusCode::LOOP_DETECTED,
            Self::NoConnection(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Ended(_) | Self::BadAnswer => StatusCode::BAD_GATEWAY,
        }
    }

    /// The answer.
    pub(super) fn response(&self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::from(format!("mesh-proxy: {self}\n")));
        *response.status_mut() = self.status();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response.headers_mut().insert(FLAG, HeaderValue::from_static(self.flag()));
        response
    }
}
