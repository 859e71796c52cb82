//! Servers: a thread for each connection, and as little protocol as a scenario needs.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread::{self, sleep};
use std::time::Duration;

use socket2::SockRef;

/// Listens on every address and hands each connection to `handle`.
pub(crate) fn serve(
    addresses: &[&str],
    handle: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
) -> anyhow::Result<()> {
    let listeners: Vec<_> = addresses.iter().map(TcpListener::bind).collect::<io::Result<_>>()?;
    println!("listening");
    let handle = Arc::new(handle);
    let threads: Vec<_> = listeners
        .into_iter()
        .map(|listener| {
            let handle = Arc::clone(&handle);
            thread::spawn(move || accept(&listener, &handle))
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a listener's thread has panicked"))??;
    }
    Ok(())
}

fn accept(
    listener: &TcpListener,
    handle: &Arc<impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static>,
) -> io::Result<()> {
    loop {
        let (stream, client) = listener.accept()?;
        println!("accepted {client}");
        let handle = Arc::clone(handle);
        thread::spawn(move || {
            if let Err(error) = handle(stream) {
                eprintln!("{client}: {error}");
            }
        });
    }
}

/// Takes connections as fast as they come and drops them. One that found no room would be tried again after a second.
pub(crate) fn sink(address: &str) -> anyhow::Result<()> {
    const ROOM: i32 = 4096;
    let listener = TcpListener::bind(address)?;
    SockRef::from(&listener).listen(ROOM)?;
    println!("listening");
    loop {
        drop(listener.accept());
    }
}

/// HTTP/1.1 with keep-alive. `/head` is answered with the request's head as it came, `/slow` takes its time in the
/// middle of the body, and everything else is answered with the name.
pub(crate) fn http(stream: &TcpStream, name: &str) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(head) = head(&mut reader)? {
        println!("asked {}", head.lines().next().unwrap_or_default());
        match head.split(' ').nth(1) {
            Some("/head") => respond(stream, &head)?,
            Some("/slow") => respond_slowly(stream, name)?,
            _ => respond(stream, name)?,
        }
        if head.to_ascii_lowercase().contains("connection: close") {
            break;
        }
    }
    Ok(())
}

/// A request's first line and fields, or nothing when the client has closed.
fn head(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Ok(None);
        }
    }
    Ok(Some(head))
}

fn respond(mut stream: &TcpStream, body: &str) -> io::Result<()> {
    // Formatted first: one segment, for which no delayed acknowledgement is waited.
    let response = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(response.as_bytes())
}

fn respond_slowly(mut stream: &TcpStream, body: &str) -> io::Result<()> {
    let (first, rest) = body.split_at(body.len() / 2);
    write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{first}", body.len())?;
    sleep(Duration::from_millis(1500));
    stream.write_all(rest.as_bytes())
}

/// Has something left to say after the client has finished: what a half-open connection is for.
pub(crate) fn echo(mut stream: TcpStream) -> io::Result<()> {
    let (mut buffer, mut total) = (vec![0; 64 * 1024], 0);
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            read => {
                total += read;
                stream.write_all(&buffer[..read])?;
            }
        }
    }
    write!(stream, "{total} bytes")?;
    stream.shutdown(Shutdown::Write)
}

/// Says who it is before the client says anything.
pub(crate) fn greet(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(b"220 greeter\n")?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    write!(stream, "250 {line}")
}

/// Returns every datagram.
pub(crate) fn datagrams(address: &str) -> anyhow::Result<()> {
    let socket = UdpSocket::bind(address)?;
    println!("listening");
    let mut buffer = [0; 1500];
    loop {
        let (length, client) = socket.recv_from(&mut buffer)?;
        socket.send_to(&buffer[..length], client)?;
    }
}
