//! Work that may take minutes, on a thread of its own: the runtime's blocking threads are few, and for the database.

use tokio::sync::oneshot;

/// Starts it; what it gives comes through the channel, which is closed if it panics.
pub(crate) fn apart<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<oneshot::Receiver<T>> {
    let (send, receive) = oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_string())
        .spawn(move || drop(send.send(work())))?;
    Ok(receive)
}
