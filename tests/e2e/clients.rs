//! Unmodified programs of every kind: the hooks do not care about languages and C libraries.

use std::path::PathBuf;

use tests::{Answers, Finished, Mesh, Place, Program, Sandbox, application, url};

scenarios![everywhere:
    curl_is_steered_and_balanced_until_disabled,
    python_is_steered_and_balanced_until_disabled,
    node_is_steered_and_balanced_until_disabled,
    a_static_binary_is_steered_and_balanced_until_disabled,
];

const TIMES: &str = "6";

fn curl_is_steered_and_balanced_until_disabled(sandbox: &Sandbox) {
    let urls = vec![url(sandbox); 6];
    let options = ["--silent", "--show-error", "--max-time", "5", "--write-out", "\n"];
    steered_and_balanced_until_disabled(sandbox, || {
        application(sandbox, "curl").args(options).args(["--header", "Host: catalog"]).args(&urls)
    });
}

fn python_is_steered_and_balanced_until_disabled(sandbox: &Sandbox) {
    steered_and_balanced_until_disabled(sandbox, || {
        application(sandbox, "python3").args([source("fetch.py"), url(sandbox), TIMES.to_owned()])
    });
}

fn node_is_steered_and_balanced_until_disabled(sandbox: &Sandbox) {
    steered_and_balanced_until_disabled(sandbox, || {
        application(sandbox, "node").args([source("fetch.mjs"), url(sandbox), TIMES.to_owned()])
    });
}

fn a_static_binary_is_steered_and_balanced_until_disabled(sandbox: &Sandbox) {
    let binary = static_binary(sandbox);
    let headers =
        sandbox.program(Place::Outside, "readelf").args(["--program-headers", &binary.to_string_lossy()]);
    assert!(!headers.run().ok().contains("INTERP"), "the binary is not static");
    steered_and_balanced_until_disabled(sandbox, || {
        application(sandbox, &binary.to_string_lossy()).args([url(sandbox), TIMES.to_owned()])
    });
}

/// What the product promises, seen from a program that knows nothing of it.
#[track_caller]
fn steered_and_balanced_until_disabled<'s>(sandbox: &'s Sandbox, client: impl Fn() -> Program<'s>) {
    let mesh = Mesh::start(sandbox, "");
    answers(&client().run()).are_from(&["origin"]);

    mesh.agent.enable("shop");
    answers(&client().run()).are_balanced();
    let counters = mesh.agent.counters("shop");
    assert_eq!((counters.steered > 0, counters.errors), (sandbox.mode.is_in_kernel(), 0), "{counters:?}");
    let metrics = mesh.proxy.metrics();
    assert_eq!(
        metrics.sum("mesh_proxy_requests_total", &[r#"cluster="catalog""#, r#"code_class="2xx""#]),
        6.0
    );

    mesh.agent.disable("shop");
    answers(&client().run()).are_from(&["origin"]);
}

/// One line for each answer.
#[track_caller]
fn answers(client: &Finished) -> Answers {
    client.ok().lines().map(str::to_owned).collect()
}

fn source(file: &str) -> String {
    format!("{}/e2e/clients/{file}", env!("CARGO_MANIFEST_DIR"))
}

fn static_binary(sandbox: &Sandbox) -> PathBuf {
    let binary = sandbox.path("fetch");
    let status = std::process::Command::new("rustc")
        .args(["--edition", "2024", "-C", "target-feature=+crt-static", "-o"])
        .args([binary.clone(), source("fetch.rs").into()])
        .status();
    assert!(status.expect("run rustc").success(), "rustc cannot link a static binary");
    binary
}
