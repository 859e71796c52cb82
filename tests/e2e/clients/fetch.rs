//! `fetch URL TIMES` without any HTTP library; the test links it statically.

use std::io::{Read, Write};
use std::net::TcpStream;

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let server = args[1].strip_prefix("http://").and_then(|rest| rest.strip_suffix('/')).expect("http://SERVER/");
    for _ in 0..args[2].parse().expect("TIMES") {
        let mut stream = TcpStream::connect(server)?;
        write!(stream, "GET / HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\n\r\n")?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        println!("{}", response.split("\r\n\r\n").nth(1).expect("a body"));
    }
    Ok(())
}
