//! The request to stop that comes over HTTP, and its answer, which is given when the daemon stops.

use tokio::sync::mpsc;
use tokio::sync::watch;

/// Makes the two ends: who asks, and who stops.
pub fn quit() -> (Quit, Asked) {
    let (ask, asked) = mpsc::channel(1);
    let unanswered = watch::Sender::new(0);
    let told = unanswered.subscribe();
    (Quit { ask, unanswered }, Asked { asked, unanswered: told })
}

/// Asks the daemon to stop. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Quit {
    ask: mpsc::Sender<()>,
    unanswered: watch::Sender<usize>,
}

impl Quit {
    /// Asks. Whoever asked is answered when this is dropped.
    pub fn ask(&self) -> Unanswered {
        self.unanswered.send_modify(|count| *count += 1);
        // One request is as good as several.
        let _asked_already = self.ask.try_send(());
        Unanswered(self.unanswered.clone())
    }
}

/// A request to stop that is not answered yet.
#[derive(Debug)]
pub struct Unanswered(watch::Sender<usize>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Learns that the daemon is to stop.
#[derive(Debug)]
pub struct Asked {
    asked: mpsc::Receiver<()>,
    unanswered: watch::Receiver<usize>,
}

impl Asked {
    /// Waits for somebody to ask; for ever when nobody can any more.
    pub async fn asked(&mut self) {
        match self.asked.recv().await {
            Some(()) => {}
            None => std::future::pending().await,
        }
    }

    /// Waits until everybody who asked has been answered.
    pub async fn answered(&mut self) {
        // An error means that nobody is left who could have asked.
        let _answered = self.unanswered.wait_for(|count| *count == 0).await;
    }
}
