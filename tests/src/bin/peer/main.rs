//! The other end of every connection in the end-to-end tests.
//!
//! Servers, which say `listening`, then `accepted ADDRESS` for each connection and `asked REQUEST` for each request:
//!
//!     peer http NAME ADDRESS…     answers every request with its name
//!     peer echo ADDRESS           returns every byte, and after the last one says how many there were
//!     peer greet ADDRESS          speaks first
//!     peer datagrams ADDRESS      returns every datagram
//!     peer sink ADDRESS           closes every connection, and says nothing of them
//!
//!     peer hook [--name NAME] [--alone | --gives-way] [--translate FROM TO] CGROUP
//!                                 attaches a connect hook, which others may be beside unless it says otherwise, and which
//!                                 lets everything pass, or takes one address and port for another as a load balancer
//!     peer count-runs             has the kernel count how often programs run
//!
//! Clients, which say what they saw:
//!
//!     peer connect [--mapped] [--non-blocking] ADDRESS     whom it is connected to, and who answers a request
//!     peer decide ADDRESS…                                 for each: `steered` when it is connected, `passed` when refused
//!     peer decide-queries NAME PORT ADDRESS…               the same of DNS queries by datagram, from PORT on: `steered` when answered
//!     peer dribble ADDRESS                                 who answers a request that comes a byte at a time
//!     peer half-close ADDRESS BYTES                        what an echo says after the last byte
//!     peer datagram ADDRESS                                whom a UDP socket is connected to, and what comes back
//!     peer hold tcp|udp ADDRESS                            for each line that it reads, its own port
//!     peer linger [--mapped] ADDRESS                       for each line that it reads, whether an echo still returns it
//!     peer twins ADDRESS ADDRESS                           who answers over two connections from one port
//!     peer throw ADDRESS                                   nothing: it sends a request and closes at once
//!     peer hello ADDRESS                                   how a greeter greets and answers
//!     peer time-connects ADDRESS                           for each number that it reads, as many connects' nanoseconds
//!     peer rush ADDRESS                                    likewise, after nanoseconds in all and of the processor's
//!     peer load ADDRESS CLIENTS MILLISECONDS [RATE]        how often each server answered, as JSON

mod client;
mod hook;
mod server;

use std::env;
use std::io;
use std::process::ExitCode;

use nix::errno::Errno;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peer: {}{error:#}", errno(&error).unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> anyhow::Result<()> {
    match args {
        ["http", name, addresses @ ..] => {
            let name = (*name).to_owned();
            server::serve(addresses, move |stream| server::http(&stream, &name))
        }
        ["echo", address] => server::serve(&[address], server::echo),
        ["greet", address] => server::serve(&[address], server::greet),
        ["datagrams", address] => server::datagrams(address),
        ["sink", address] => server::sink(address),
        ["count-runs"] => hook::count_runs(),
        ["hook", options @ .., cgroup] => hook::attach(cgroup, &hook::Hook::parse(options)?),
        ["datagram", address] => client::datagram(address.parse()?),
        ["connect", options @ .., address] => client::connect(address.parse()?, options),
        ["decide", addresses @ ..] => client::decide(addresses),
        ["decide-queries", name, first, addresses @ ..] => {
            client::decide_queries(name, first.parse()?, addresses)
        }
        ["dribble", address] => client::dribble(address.parse()?),
        ["half-close", address, bytes] => client::half_close(address.parse()?, bytes.parse()?),
        ["hold", "tcp", address] => client::hold_connection(address.parse()?),
        ["hold", "udp", address] => client::hold_datagrams(address.parse()?),
        ["linger", options @ .., address] => client::linger(address.parse()?, options),
        ["twins", first, second] => client::twins([first.parse()?, second.parse()?]),
        ["hello", address] => client::hello(address.parse()?),
        ["throw", address] => client::throw(address.parse()?),
        ["time-connects", address] => client::time_connects(address.parse()?),
        ["rush", address] => client::rush(address.parse()?),
        ["load", address, clients, milliseconds, rate @ ..] => {
            let rate = rate.first().map(|rate| rate.parse()).transpose()?;
            client::load(address.parse()?, clients.parse()?, milliseconds.parse()?, rate)
        }
        _ => anyhow::bail!("usage: see the head of its source"),
    }
}

/// `ECONNREFUSED: ` is easier to compare than a sentence.
fn errno(error: &anyhow::Error) -> Option<String> {
    let code = error.downcast_ref::<io::Error>()?.raw_os_error()?;
    Some(format!("{:?}: ", Errno::from_raw(code)))
}
