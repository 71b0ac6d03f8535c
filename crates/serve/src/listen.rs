//! Connections: accepting them, TLS, limits on heads, and letting them finish.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};
use tokio_rustls::TlsAcceptor;

use crate::ServeError;
use crate::write_timeout::WriteTimeout;

/// A certificate and its key, in PEM files.
#[derive(Debug, Clone)]
pub struct Tls {
    /// The certificate, and those between it and a root.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Tls {
    /// Reads the files.
    pub(crate) fn acceptor(&self) -> Result<TlsAcceptor, ServeError> {
        let fail = |path: &PathBuf, reason: String| ServeError::Tls {
            path: path.clone(),
            reason,
        };
        let read = |e: rustls::pki_types::pem::Error| e.to_string();
        let certs: Result<Vec<_>, _> = CertificateDer::pem_file_iter(&self.cert)
            .map_err(|e| fail(&self.cert, read(e)))?
            .collect();
        let certs = certs.map_err(|e| fail(&self.cert, read(e)))?;
        if certs.is_empty() {
            return Err(fail(&self.cert, "it holds no certificate".to_string()));
        }
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|e| fail(&self.key, read(e)))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(certs, key))
            .map_err(|e| fail(&self.cert, e.to_string()))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

/// Limits of every connection.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Open at the same time.
    pub(crate) connections: usize,
    /// How long a request's head may take, and an idle connection may wait for it.
    pub(crate) head_timeout: Duration,
    /// The longest head.
    pub(crate) head_bytes: usize,
    /// How long a client may read nothing of an answer.
    pub(crate) write_timeout: Duration,
    /// Counts the clients that did.
    pub(crate) slow_clients: Arc<AtomicU64>,
    /// How long running requests may take once the server is told to stop.
    pub(crate) grace: Duration,
}

/// Serves until told to stop, then until what runs has ended, `quiet` too, or the grace is over.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    limits: Limits,
    mut stopped: oneshot::Receiver<()>,
    quiet: impl Future<Output = ()>,
) {
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(limits.connections));
    loop {
        // Beyond the limit, connections wait in the system's queue.
        let permit = tokio::select! {
            permit = Arc::clone(&room).acquire_owned() => permit,
            // A dropped sender means stop, too.
            _ = &mut stopped => break,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut stopped => break,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                // Out of file descriptors, or a client that left early: neither ends the server.
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // A chunk of a stream is small and should leave at once.
        let _ = socket.set_nodelay(true);
        let socket = WriteTimeout::new(socket, limits.write_timeout);
        let (router, limits, tls) = (router.clone(), limits.clone(), tls.clone());
        let watcher = graceful.watcher();
        tokio::spawn(async move {
            let _permit = permit;
            match tls {
                None => connection(socket, router, &limits, watcher).await,
                Some(tls) => {
                    let shake = tokio::time::timeout(limits.head_timeout, tls.accept(socket));
                    if let Ok(Ok(socket)) = shake.await {
                        connection(socket, router, &limits, watcher).await;
                    }
                }
            }
        });
    }
    drop(listener);
    tokio::select! {
        () = async { graceful.shutdown().await; quiet.await } => {}
        () = tokio::time::sleep(limits.grace) => {}
    }
}

async fn connection(
    socket: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    limits: &Limits,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_buf_size(limits.head_bytes);
    let connection =
        builder.serve_connection(TokioIo::new(socket), TowerToHyperService::new(router));
    // What a client does wrong with HTTP itself it is told by hyper.
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "a connection broke");
        if is_timeout(&error) {
            limits.slow_clients.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Was it [`WriteTimeout`] that ended the connection?
fn is_timeout(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let source = error.downcast_ref::<std::io::Error>();
        if source.is_some_and(|e| e.kind() == std::io::ErrorKind::TimedOut) {
            return true;
        }
        cause = error.source();
    }
    false
}
