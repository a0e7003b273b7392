//! The command line's view of a running daemon: asks its admin port, and prints tables or JSON.
//!
//! What is read is the dump that `istioctl ztunnel-config` reads, and the tables have its columns, so that what one knows
//! of one holds for the other. Keys that are missing (names aside) or
//! unknown do no harm: a dump may be another release's.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

pub mod client;
pub mod dump;
mod process;
mod render;

use client::ClientError;
use dump::Filter;
use ztunnel_mesh::dump::Dump;

/// What of a daemon is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// All of the following.
    All,
    /// The workloads of the mesh.
    Workload,
    /// Its services.
    Service,
    /// Its policies.
    Policy,
    /// The certificates of this node's identities.
    Certificate,
    /// The open connections of this node's pods.
    Connections,
}

/// Whom to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A daemon, by the address of its admin port.
    Daemon(SocketAddr),
    /// A dump that was saved.
    File(PathBuf),
}

/// What to show, of what, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// Which part.
    pub what: What,
    /// Whom to ask.
    pub source: Source,
    /// What of it to leave out.
    pub filter: Filter,
    /// Addresses as they are, without names in their place.
    pub raw: bool,
    /// The daemon's JSON instead of tables.
    pub json: bool,
}

/// Why nothing is shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The daemon was not to be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The file was not to be read.
    #[error("cannot read {}", .0.display())]
    File(PathBuf, #[source] std::io::Error),
    /// It is no dump.
    #[error("this is no dump of a node proxy")]
    Dump(#[source] serde_json::Error),
    /// The name that was asked for is nobody's.
    #[error("there is no {what} {name:?} (in this namespace, on this node){}", or_is_there(near))]
    NoSuch {
        /// Of what it was asked for.
        what: &'static str,
        /// The name.
        name: String,
        /// Names that there are, those that begin alike first.
        near: Vec<String>,
    },
    /// Standard output is closed.
    #[error("cannot print")]
    Print(#[from] std::io::Error),
}

fn or_is_there(near: &[String]) -> String {
    if near.is_empty() { String::new() } else { format!("; there are {}", near.join(", ")) }
}

impl What {
    /// One of it.
    fn noun(self) -> &'static str {
        match self {
            Self::All => "workload, service or policy",
            Self::Workload => "workload",
            Self::Service => "service",
            Self::Policy => "policy",
            Self::Certificate => "certificate of",
            Self::Connections => "pod",
        }
    }
}

/// Prints what `query` asks for. `now` decides which certificates are valid.
pub fn show(query: &Query, now: time::UtcDateTime, out: &mut impl Write) -> Result<(), Error> {
    let bytes = match &query.source {
        Source::Daemon(address) => client::get(*address, "/config_dump")?,
        Source::File(path) => std::fs::read(path).map_err(|error| Error::File(path.clone(), error))?,
    };
    let dump: Dump<'_> = serde_json::from_slice(&bytes).map_err(Error::Dump)?;
    if let Some(name) = &query.filter.name
        && !dump::has(&dump, query.what, &query.filter)
    {
        let near = dump::near(&dump, query.what, name);
        return Err(Error::NoSuch { what: query.what.noun(), name: name.clone(), near });
    }
    if query.json {
        let dump = serde_json::from_slice(&bytes).map_err(Error::Dump)?;
        let part = dump::part(dump, query.what, &query.filter);
        serde_json::to_writer_pretty(&mut *out, &part).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        out.write_all(render::tables(&dump, query, now).as_bytes())?;
    }
    Ok(())
}

/// Asks for the log's levels, or sets them first: `level` is as the admin port takes it, such as `access:debug`.
pub fn log(address: SocketAddr, level: Option<&str>, reset: bool, out: &mut impl Write) -> Result<(), Error> {
    let mut arguments = Vec::new();
    arguments.extend(level.map(|level| format!("level={}", client::escape(level))));
    arguments.extend(reset.then(|| "reset".to_owned()));
    let path = match arguments.is_empty() {
        true => "/logging".to_owned(),
        false => format!("/logging?{}", arguments.join("&")),
    };
    out.write_all(&client::post(address, &path)?)?;
    Ok(())
}

/// Has a daemon read its mesh files now, and prints what came of it; with `force`, what they take away is meant.
pub fn reload(address: SocketAddr, force: bool, out: &mut impl Write) -> Result<(), Error> {
    let path = if force { "/reload?force=true" } else { "/reload" };
    out.write_all(&client::post(address, path)?)?;
    Ok(())
}

#[cfg(test)]
mod tests;
