//! Everything in the data plane that peers, applications or the mesh could make grow, and what bounds it.
//!
//! | what | whose | bound | when full | metric |
//! |---|---|---|---|---|
//! | all that connections, streams and tunnels hold, and cost themselves | node | `--buffer-memory` (half of the memory limit) | those who hold most are closed: of the pod that holds most first | `ztunnel_buffer_bytes`, `ztunnel_connections_shed_total` |
//! | the same | pod | half of it | the pod's own that hold most are closed, of the source that makes it hold most first | the same |
//! | a connection or stream that holds nothing | pod | counts 8 KiB | as above | the same |
//! | a tunnel that holds nothing | pod | counts 36 KiB | as above | the same |
//! | received from a tunnel and not taken by the application | stream | its window: 1 MiB; 256 KiB once a quarter of the buffer memory is used, 64 KiB once half is | the peer waits, on this stream alone | `ztunnel_buffer_bytes` |
//! | to be sent to a peer | stream | 512 KiB, and no more than the peer's windows allow is read | the application is not read | `ztunnel_buffer_bytes` |
//! | the same | tunnel | 1 MiB | no application is read for it | `ztunnel_buffer_bytes` |
//! | encrypted and not taken by the socket | tunnel | 256 KiB | as above | `ztunnel_buffer_bytes` |
//! | read of a socket and not written to the other | direction of a plain or same-node connection | 64 KiB; 16 KiB once half of the buffer memory is used | it is not read | `ztunnel_buffer_bytes` |
//! | the same in a pipe, where there is much | thread | 32 of 512 KiB | bytes are copied | `ztunnel_buffer_bytes` |
//! | what an application says before it is connected | connection | 16 KiB | it is not read | `ztunnel_buffer_bytes` |
//! | what was said before a connection broke, and is not taken | connection | 1 s | lost: the other end is reset | |
//! | a request that is not answered yet, with what its client says meanwhile | stream | headers of 64 KiB and the window | as above | `ztunnel_buffer_bytes` |
//! | connections and streams | pod | 20000 | reset, streams 503 | `ztunnel_connections_turned_away_total` |
//! | tunnels of peers | pod | 10000 | reset | `ztunnel_connections_turned_away_total` |
//! | the same | identity | a quarter of these | the one that is idle longest is closed; if none is, reset | `ztunnel_connections_turned_away_total` |
//! | a tunnel of a peer without streams | tunnel | 600 s | closed | |
//! | a tunnel to a peer without streams | tunnel | 300 s | closed | |
//! | TLS handshakes of peers | pod | 1024, each 10 s | of the source that has most the oldest is closed | `ztunnel_connections_turned_away_total` |
//! | the same | source: an IPv4 address, or an IPv6 /64 | an eighth of these | of its address that has most the oldest is closed; for one that has as many, younger than 1 s: reset | `ztunnel_connections_turned_away_total` |
//! | streams on a tunnel | tunnel | 200 as server, 100 as client | refused as server; another tunnel as client | |
//! | tunnels of one thread to one peer on which nothing moves | pod and peer | 8 | further streams share them | |
//! | tunnels dialled for a connection whose peer refuses each stream | connection | 3 | reset | |
//! | connections that wait for a tunnel being dialled | thread, pod and peer | 1024 | reset | |
//! | frames in a pass over a tunnel | tunnel | 128 | others have their turn | |
//! | frames that carry nothing | tunnel | 10000 at once, 500 a second and what there is reason for | GOAWAY (ENHANCE_YOUR_CALM), closed | |
//! | work for what one source dials of a pod, or for what the pod dials | thread | 500 µs in a turn | others have their turn | |
//! | accepted connections on their way to another thread | thread | 1024 | the accepting thread keeps them | |
//! | devices of a captured pod | pod | 64 | closed until it has fewer | `ztunnel_capture_pods_closed` |
//! | devices that were taken out of a captured pod into other network namespaces, and are guarded there | pod | 64, and those that are guarded by then | no further device of it is guarded; if it has one, closed until some are deleted | `ztunnel_capture_devices_left_total`, `ztunnel_capture_pods_closed` |
//! | descriptors | process | RLIMIT_NOFILE | new connections are reset at once | `ztunnel_connections_turned_away_total` |
//!
//! So the daemon's memory is at most what it takes by itself, with the mesh it knows (20 MiB, and some KiB for every
//! workload), and about twice the buffer memory: an allocator does not reuse every gap, and until a quarter of the
//! buffer memory is used small pieces may keep larger buffers. The kernel's memory for sockets comes on top, and is
//! bounded by its own settings (`net.ipv4.tcp_mem`, or the control group).
//!
//! The same table is in `deploy/README.md`.

/// What a connection or a stream costs that holds no bytes of anybody, about.
pub const CONNECTION_COST: usize = 8 * 1024;

/// What a tunnel without streams costs, about.
pub const TUNNEL_COST: usize = 36 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::guards;
    use crate::hbone;
    use crate::net::budget::POD_PART;
    use crate::net::copy::PARTING_WITHIN;
    use crate::proxy::Config;
    use crate::proxy::handshakes::SOURCE_PART;
    use crate::proxy::relay::EARLY_MAX;
    use crate::proxy::tunnels::IDENTITY_PART;
    use crate::proxy::turns::SLICE;
    use crate::proxy::upstream::REFUSALS_MAX;

    /// The rows of a table, without the marks of a comment.
    fn rows(text: &str) -> Vec<&str> {
        let lines = text.lines().map(|line| line.trim_start_matches("//! "));
        let mut rows = lines.skip_while(|line| *line != "| what | whose | bound | when full | metric |");
        rows.by_ref().take_while(|line| line.starts_with('|')).collect()
    }

    #[test]
    fn the_table_says_what_holds_and_operators_have_the_same() {
        let own = rows(include_str!("bounds.rs"));
        assert!(own.len() > 20);
        assert_eq!(own, rows(include_str!("../../../../deploy/README.md")));

        let config = Config::default();
        let hbone: &hbone::Config = &config.hbone;
        let kib = |bytes: usize| format!("{} KiB", bytes / 1024);
        let mib = |bytes: usize| format!("{} MiB", bytes >> 20);
        for (what, bound) in [
            ("a connection or stream that holds nothing", format!("counts {}", kib(CONNECTION_COST))),
            ("a tunnel that holds nothing", format!("counts {}", kib(TUNNEL_COST))),
            ("received from a tunnel", format!("its window: {};", mib(hbone.stream_window as usize))),
            ("to be sent to a peer", kib(hbone.send_buffer)),
            ("the same | tunnel", mib(hbone.tunnel_send_buffer)),
            ("encrypted and not taken", kib(hbone::BACKLOG_MAX)),
            ("read of a socket", kib(crate::net::buffer::READ_SIZE)),
            ("what an application says before", kib(EARLY_MAX)),
            ("what was said before a connection broke", format!("{} s", PARTING_WITHIN.as_secs())),
            ("a request that is not answered yet", kib(hbone.request_headers_max as usize)),
            ("connections and streams", config.pod_connections_max.to_string()),
            ("tunnels of peers", config.pod_tunnels_max.to_string()),
            ("a tunnel of a peer without", format!("{} s", hbone.server_idle_timeout.as_secs())),
            ("a tunnel to a peer without", format!("{} s", hbone.idle_timeout.as_secs())),
            ("TLS handshakes", format!("{}, each", config.pod_handshakes_max)),
            ("streams on a tunnel", format!("{} as server", hbone.server_streams_max)),
            ("streams on a tunnel", format!("{} as client", hbone.client_streams_max)),
            ("connections that wait", hbone.waiters_max.to_string()),
            ("tunnels of one thread", hbone::pool::EXHAUSTED_MAX.to_string()),
            ("tunnels dialled for", REFUSALS_MAX.to_string()),
            ("frames in a pass", hbone::PASS_FRAMES_MAX.to_string()),
            ("frames that carry nothing", format!("{} at once", hbone::IDLE_FRAMES_MAX)),
            ("frames that carry nothing", format!("{} a second", hbone::IDLE_FRAMES_PER_SECOND)),
            ("work for what one source", format!("{} µs in a turn", SLICE.as_micros())),
            ("devices of a captured pod", format!("| {} |", guards::DEVICES_MAX)),
            ("devices that were taken", format!("| {}, and", guards::ELSEWHERE_MAX)),
            ("accepted connections", config.handover_max.to_string()),
        ] {
            let row = own.iter().find(|row| row.starts_with(&format!("| {what}")));
            let row = row.unwrap_or_else(|| panic!("no row about {what}"));
            assert!(row.contains(&bound), "{bound} is not in {row}");
        }
        // Said in words.
        assert_eq!((POD_PART, IDENTITY_PART, SOURCE_PART), (2, 4, 8));
    }
}
