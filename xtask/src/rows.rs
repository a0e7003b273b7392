//! The rows: what is measured, by which load, and how it is reported.

/// A load that brings one row or several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// From the start of the client's proxy to the first byte through it.
    FirstByte,
    /// Proxies that have nothing to do.
    Idle,
    /// Connections that do nothing, and their end.
    Crowd {
        /// How many.
        connections: u32,
    },
    /// Requests as fast as they are answered.
    Http {
        /// Kept open.
        connections: u32,
        /// To the server on the client's node.
        near: bool,
    },
    /// One request on each new connection.
    Connect {
        /// At a time.
        clients: u32,
    },
    /// Bytes as fast as they go.
    Stream {
        /// At a time.
        streams: u32,
        /// From the server to the client.
        reverse: bool,
        /// With the server on the client's node.
        near: bool,
    },
    /// Requests at a fixed rate.
    Open {
        /// Per second.
        rate: u32,
    },
}

/// Which of two values is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// The higher.
    Higher,
    /// The lower.
    Lower,
}

/// What a row belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Requests, connections and bytes per second.
    Throughput,
    /// Times.
    Latency,
    /// CPU time of the proxies alone.
    Cpu,
    /// Resident memory, the mean of the two proxies.
    Memory,
}

/// One line of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// What it counts, for people.
    pub title: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// Which way is better.
    pub better: Better,
    /// What it belongs to.
    pub group: Group,
    /// What brings it.
    pub work: Work,
    /// Whether `--quick` has it.
    pub quick: bool,
}

const HTTP_64: Work = http(64);
const CONNECT_16: Work = Work::Connect { clients: 16 };
const STREAM_1: Work = stream(1, false);
const CROWD: Work = Work::Crowd { connections: 5000 };

const fn http(connections: u32) -> Work {
    Work::Http { connections, near: false }
}

const fn stream(streams: u32, reverse: bool) -> Work {
    Work::Stream { streams, reverse, near: false }
}

const fn open(rate: u32) -> Work {
    Work::Open { rate }
}

const fn row(
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    (better, group): (Better, Group),
    work: Work,
) -> Row {
    Row { name, title, unit, better, group, work, quick: false }
}

impl Row {
    const fn quick(self) -> Self {
        Self { quick: true, ..self }
    }
}

const FAST: (Better, Group) = (Better::Higher, Group::Throughput);
const LATE: (Better, Group) = (Better::Lower, Group::Latency);
const COST: (Better, Group) = (Better::Lower, Group::Cpu);
const SIZE: (Better, Group) = (Better::Lower, Group::Memory);
const SAME_HTTP: Work = Work::Http { connections: 64, near: true };
const SAME_STREAM: Work = Work::Stream { streams: 1, reverse: false, near: true };

/// All rows, in the order of the report. The loads run in the order in which they first occur here.
pub const ROWS: [Row; 33] = [
    row("http_1", "requests, 1 connection", "req/s", FAST, http(1)).quick(),
    row("http_64", "requests, 64 connections", "req/s", FAST, HTTP_64).quick(),
    row("http_256", "requests, 256 connections", "req/s", FAST, http(256)),
    row("connect_16", "new connections, 16 clients", "conn/s", FAST, CONNECT_16).quick(),
    row("stream_1", "1 stream", "Gbit/s", FAST, STREAM_1).quick(),
    row("stream_4", "4 streams", "Gbit/s", FAST, stream(4, false)),
    row("stream_16", "16 streams", "Gbit/s", FAST, stream(16, false)),
    row("stream_1_r", "1 stream from the server", "Gbit/s", FAST, stream(1, true)),
    row("stream_4_r", "4 streams from the server", "Gbit/s", FAST, stream(4, true)),
    row("stream_16_r", "16 streams from the server", "Gbit/s", FAST, stream(16, true)),
    row("same_node_http_64", "same node: requests, 64 connections", "req/s", FAST, SAME_HTTP),
    row("same_node_stream_1", "same node: 1 stream", "Gbit/s", FAST, SAME_STREAM),
    row("open_2000_p50", "half of 2,000 requests/s within", "µs", LATE, open(2000)),
    row("open_2000_p99", "99 % of 2,000 requests/s within", "µs", LATE, open(2000)),
    row("open_2000_p999", "99.9 % of 2,000 requests/s within", "µs", LATE, open(2000)),
    row("open_5000_p50", "half of 5,000 requests/s within", "µs", LATE, open(5000)).quick(),
    row("open_5000_p99", "99 % of 5,000 requests/s within", "µs", LATE, open(5000)).quick(),
    row("open_5000_p999", "99.9 % of 5,000 requests/s within", "µs", LATE, open(5000)).quick(),
    row("open_10000_p50", "half of 10,000 requests/s within", "µs", LATE, open(10_000)),
    row("open_10000_p99", "99 % of 10,000 requests/s within", "µs", LATE, open(10_000)),
    row("open_10000_p999", "99.9 % of 10,000 requests/s within", "µs", LATE, open(10_000)),
    row("first_byte_ms", "start of the client's proxy to first byte", "ms", LATE, Work::FirstByte).quick(),
    row("cpu_per_1k_requests", "CPU per 1,000 requests (http_64)", "ms", COST, HTTP_64).quick(),
    row("cpu_per_1k_requests_1", "CPU per 1,000 requests (http_1)", "ms", COST, http(1)).quick(),
    row("cpu_per_gb", "CPU per GB (stream_1)", "s", COST, STREAM_1).quick(),
    row("cpu_per_gb_4", "CPU per GB (stream_4)", "s", COST, stream(4, false)),
    row("cpu_per_gb_r", "CPU per GB from the server (stream_1_r)", "s", COST, stream(1, true)),
    row("cpu_per_connection", "CPU per new connection (connect_16)", "µs", COST, CONNECT_16).quick(),
    row("cpu_per_1k_open_5000", "CPU per 1,000 requests at 5,000/s", "ms", COST, open(5000)).quick(),
    row("rss_idle", "memory of a proxy, idle", "MiB", SIZE, Work::Idle).quick(),
    row("rss_5000_idle", "memory with 5,000 idle connections", "MiB", SIZE, CROWD),
    row("rss_after_close", "memory 10 s after they are closed", "MiB", SIZE, CROWD),
    row("rss_per_connection", "memory per idle connection and proxy", "KiB", SIZE, CROWD),
];

/// The rows that these names ask for; a name that ends in `*` asks for all that start so. An unknown name is the
/// error.
pub fn select(names: &[String]) -> Result<Vec<Row>, String> {
    let asked = |name: &str, row: &Row| match name.strip_suffix('*') {
        Some(start) => row.name.starts_with(start),
        None => row.name == name,
    };
    if let Some(unknown) = names.iter().find(|name| !ROWS.iter().any(|row| asked(name, row))) {
        return Err(unknown.clone());
    }
    Ok(ROWS.into_iter().filter(|row| names.iter().any(|name| asked(name, row))).collect())
}

/// The loads that these rows need, each once. What looks at memory alone goes first, while the proxies are fresh.
pub fn works(rows: &[Row]) -> Vec<Work> {
    let mut works: Vec<Work> = Vec::new();
    for row in rows {
        if !works.contains(&row.work) {
            works.push(row.work);
        }
    }
    works.sort_by_key(|work| match work {
        Work::FirstByte => 0,
        Work::Idle => 1,
        Work::Crowd { .. } => 2,
        _ => 3,
    });
    works
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_selected_by_name_and_by_start() {
        let names = |asked: &[&str]| {
            let asked: Vec<String> = asked.iter().map(|&name| name.to_owned()).collect();
            select(&asked).map(|rows| rows.iter().map(|row| row.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&["stream_1", "http_1"]), Ok(vec!["http_1", "stream_1"]));
        assert_eq!(names(&["open_2000_*"]).map(|rows| rows.len()), Ok(3));
        assert_eq!(names(&["http_2"]), Err("http_2".to_owned()));
    }

    #[test]
    fn a_load_that_brings_two_rows_runs_once_and_memory_is_looked_at_first() {
        let rows = select(&["http_64".into(), "cpu_per_1k_requests".into(), "rss_*".into()]);
        let works = works(&rows.expect("known"));
        assert_eq!(works, [Work::Idle, CROWD, HTTP_64]);
    }

    #[test]
    fn names_are_unique() {
        for (index, row) in ROWS.iter().enumerate() {
            assert!(ROWS[..index].iter().all(|other| other.name != row.name), "{}", row.name);
        }
    }
}
