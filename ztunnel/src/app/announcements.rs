//! Waiting for what the kernel announces of pods' network namespaces.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::time::Instant;
use ztunnel_node::net::socket::readable;

/// Two answers to announcements are no closer together: who makes many of them does not keep the daemon busy.
const APART: Duration = Duration::from_millis(20);

/// See the module.
pub(super) struct Announcements {
    /// `None` where nothing is announced.
    socket: Option<AsyncFd<OwnedFd>>,
    /// When the next answer may be given.
    not_before: Instant,
    /// When somebody is to be looked at that could not be yet.
    due: Option<Instant>,
}

impl Announcements {
    /// Of this socket; in the context of a runtime.
    pub(super) fn new(socket: Option<OwnedFd>) -> Self {
        let socket = socket.and_then(|socket| {
            let watched = readable(socket);
            watched
                .inspect_err(
                    |error| tracing::warn!(%error, "announcements are looked for every other second"),
                )
                .ok()
        });
        Self { socket, not_before: Instant::now(), due: None }
    }

    /// Returns when there is something to look at. The look itself takes it off the socket. To be dropped and called
    /// again at will.
    pub(super) async fn next(&mut self) {
        tokio::time::sleep_until(self.not_before).await;
        let due = self.due;
        let due = async {
            match due {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let announced = async {
            match &self.socket {
                Some(socket) => match socket.readable().await {
                    Ok(mut ready) => ready.clear_ready(),
                    // The runtime ends.
                    Err(_) => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = announced => {}
            () = due => {}
        }
    }

    /// It was looked at, and is to be once more then.
    pub(super) fn answered(&mut self, again: Option<Instant>) {
        self.not_before = Instant::now() + APART;
        self.due = again;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn each_announcement_is_told_once_and_what_was_put_off_too() {
        let (mut kernel, socket) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut announcements = Announcements::new(Some(socket.into()));
        let within = |time| Duration::from_millis(time);
        assert!(tokio::time::timeout(within(30), announcements.next()).await.is_err());
        kernel.write_all(b"x").unwrap();
        announcements.next().await;
        announcements.answered(None);
        assert!(tokio::time::timeout(within(60), announcements.next()).await.is_err());
        announcements.answered(Some(Instant::now() + within(1)));
        announcements.next().await;
        announcements.answered(None);
        kernel.write_all(b"x").unwrap();
        announcements.next().await;
    }

    #[tokio::test]
    async fn where_nothing_is_announced_nothing_is_told() {
        let mut announcements = Announcements::new(None);
        assert!(tokio::time::timeout(Duration::from_millis(30), announcements.next()).await.is_err());
    }
}
