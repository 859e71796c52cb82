//! A worker: a thread with its own runtime, listeners and pool. Nothing of a connection ever leaves it.

use crate::{
    accept::{self, Listeners},
    connection,
    context::Context,
    observe::Metrics,
};
use std::{cell::Cell, io, rc::Rc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime,
    sync::{mpsc, oneshot},
    task::LocalSet,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout_at},
};

/// How often the kernel is told that the listeners are served; it waits for three seconds.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(250);

/// Whether it serves, and where to say so.
pub(crate) type Questions = mpsc::UnboundedReceiver<oneshot::Sender<()>>;

/// Serves until the process is to end, then finishes what is open, for so long. `listening` hears whether it can.
pub(crate) fn run(
    context: Context,
    port: u16,
    questions: Questions,
    drain_timeout: Duration,
    listening: impl FnOnce(io::Result<()>),
) {
    let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return listening(Err(error)),
    };
    LocalSet::new().block_on(&runtime, async {
        let bound = Listeners::bind(port).and_then(|listeners| Ok((listeners, bind_names(&context)?)));
        match bound {
            Ok((listeners, named)) => {
                listening(Ok(()));
                serve(Rc::new(context), listeners, named, questions, drain_timeout).await;
            }
            Err(error) => listening(Err(error)),
        }
    });
}

/// Listening sockets of names, and the names.
type Named = Vec<(TcpListener, Rc<str>)>;

fn bind_names(context: &Context) -> io::Result<Named> {
    let mut named = Vec::new();
    for name in context.names.iter() {
        let domain: Rc<str> = name.name.as_str().into();
        for &port in &name.ports {
            let listener = accept::bind_named((name.address, port).into())?;
            named.push((listener, Rc::clone(&domain)));
        }
    }
    Ok(named)
}

async fn serve_name(context: Rc<Context>, open: Rc<Cell<usize>>, listener: TcpListener, domain: Rc<str>) {
    loop {
        tokio::select! {
            stream = accept::accept_named(&listener) => spawn(&context, &open, stream, Some(Rc::clone(&domain))),
            () = context.draining() => return,
        }
    }
}

async fn serve(
    context: Rc<Context>,
    listeners: Listeners,
    named: Named,
    mut questions: Questions,
    drain_timeout: Duration,
) {
    let open = Rc::new(Cell::new(0));
    for (listener, domain) in named {
        tokio::task::spawn_local(serve_name(Rc::clone(&context), Rc::clone(&open), listener, domain));
    }
    let mut heartbeat = interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            stream = listeners.accept() => spawn(&context, &open, stream, None),
            _ = heartbeat.tick() => {
                listeners.heartbeat();
                context.pool.sweep();
            }
            Some(reply) = questions.recv() => {
                listeners.heartbeat();
                let _nobody_waits_any_more = reply.send(());
            }
            () = context.draining() => break,
        }
    }
    // Those who were connected before the listeners close would be reset with them.
    while let Some(stream) = listeners.accept_waiting().await {
        spawn(&context, &open, stream, None);
    }
    drop(listeners);
    drain(&open, drain_timeout).await;
}

fn spawn(context: &Rc<Context>, open: &Rc<Cell<usize>>, stream: TcpStream, name: Option<Rc<str>>) {
    let context = Rc::clone(context);
    let connection = Open::new(&context.metrics, Rc::clone(open));
    tokio::task::spawn_local(async move {
        let served = match name {
            Some(name) => connection::serve_named(&context, &name, stream).await,
            None => connection::serve(&context, stream).await,
        };
        if let Err(error) = served {
            tracing::debug!("connection: {error}");
        }
        drop(connection);
    });
}

async fn drain(open: &Cell<usize>, limit: Duration) {
    let all_ended = async {
        while open.get() > 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    if timeout_at(Instant::now() + limit, all_ended).await.is_err() {
        tracing::warn!("{} connections were still open after {limit:?} and are cut off", open.get());
    }
}

/// An open connection, counted while it lives.
struct Open {
    metrics: Metrics,
    open: Rc<Cell<usize>>,
}

impl Open {
    fn new(metrics: &Metrics, open: Rc<Cell<usize>>) -> Self {
        metrics.active.inc();
        open.set(open.get() + 1);
        Self { metrics: metrics.clone(), open }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.metrics.active.dec();
        self.open.set(self.open.get() - 1);
    }
}
