//! A node with pods that cannot be captured is not ready.

use tokio::sync::watch;
use ztunnel_node::admin::ready::Readiness;

/// What readiness says of it.
const NAME: &str = "pods that cannot be captured and are closed";

/// Blocks readiness while there are such pods. Ends with whoever counts them.
pub(super) async fn blocks(mut closed: watch::Receiver<usize>, ready: Readiness) {
    let mut blocker = None;
    loop {
        let some = *closed.borrow_and_update() > 0;
        blocker = match (blocker.take(), some) {
            (None, true) => Some(ready.block(NAME)),
            (Some(blocker), false) => {
                blocker.lift();
                None
            }
            (unchanged, _) => unchanged,
        };
        if closed.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_is_ready_when_no_pod_is_closed() {
        let (count, closed) = watch::channel(0);
        let ready = Readiness::new();
        let task = ztunnel_runtime::shutdown::spawn(blocks(closed, ready.clone()));
        for (pods, pending) in [(0, 0), (2, 1), (1, 1), (0, 0), (3, 1)] {
            count.send_replace(pods);
            while ready.pending().len() != pending {
                tokio::task::yield_now().await;
            }
        }
        drop(count);
        task.await.unwrap();
        assert_eq!(ready.pending(), [NAME]);
    }
}
