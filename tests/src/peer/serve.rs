//! A server that answers each line with the client's address and the line.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};

/// Serves on this port of every address, both families, until the process ends.
pub fn serve(port: u16) -> Result<()> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(1024).with_context(|| format!("cannot listen on {port}"))?;
    let listener = TcpListener::from(socket);
    for stream in listener.incoming() {
        let stream = stream?;
        thread::Builder::new().stack_size(64 << 10).spawn(move || {
            // The client's end of the connection is not this server's failure.
            let _client_gone = answer(&stream);
        })?;
    }
    Ok(())
}

fn answer(stream: &TcpStream) -> Result<()> {
    let client = stream.peer_addr()?.ip().to_canonical();
    let mut writer = stream;
    for line in BufReader::new(stream).lines() {
        writer.write_all(format!("{client} {}\n", line?).as_bytes())?;
    }
    Ok(())
}
