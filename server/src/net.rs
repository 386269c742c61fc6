//! The doors: listening sockets, TLS, and what bounds every connection before a byte of it is understood.
//!
//! A [`Door`] accepts, counts, encrypts and hands connections on; a [`Connection`] ends itself when the peer does not
//! begin to speak in time, floods (see `frames.rs`), grows too old, or the server is over.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Sleep;
use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::frames::{Budget, FORBIDDEN_FRAME, FrameGuard};
use crate::{ConnectionLimits, ServerError, Tls};

/// Accepted connections waiting for their protocol's loop.
const BACKLOG: usize = 64;

/// Which protocol a door speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// gRPC: HTTP/2 only.
    Http2,
    /// `/metrics` and health: HTTP/1 only.
    Http1,
}

/// Waits until the value is true, or its sender is gone, which means the same.
pub(crate) async fn is_true(mut watched: watch::Receiver<bool>) {
    let _ = watched.wait_for(|value| *value).await;
}

/// A listening socket.
pub(crate) struct Door {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    protocol: Protocol,
    limits: ConnectionLimits,
}

impl Door {
    pub(crate) async fn bind(
        addr: SocketAddr,
        protocol: Protocol,
        tls: Option<&Tls>,
        limits: &ConnectionLimits,
    ) -> Result<Self, ServerError> {
        let tls = tls.map(|tls| acceptor(tls, protocol)).transpose()?;
        let listener = TcpListener::bind(addr).await.map_err(|source| ServerError::Bind { addr, source })?;
        Ok(Self { listener, tls, protocol, limits: limits.clone() })
    }

    pub(crate) fn local_addr(&self) -> Result<SocketAddr, ServerError> {
        self.listener.local_addr().map_err(ServerError::Socket)
    }

    /// Accepts until `closing` is true; then the socket is closed. Connections end themselves once `over` is true.
    pub(crate) fn open(
        self,
        closing: watch::Receiver<bool>,
        over: watch::Receiver<bool>,
    ) -> mpsc::Receiver<Connection> {
        let (connections, receiver) = mpsc::channel(BACKLOG);
        tokio::spawn(async move {
            let permits = Arc::new(Semaphore::new(self.limits.connections_max));
            let mut closing = std::pin::pin!(is_true(closing));
            loop {
                tokio::select! {
                    () = &mut closing => return,
                    accepted = self.listener.accept() => match accepted {
                        Ok((socket, _)) => self.receive(socket, &permits, &over, &connections),
                        // Out of file descriptors: the socket stays in the backlog, so asking again at once would spin.
                        Err(error) => {
                            tracing::warn!(%error, "accept failed");
                            tokio::time::sleep(Duration::from_millis(50)).await;
                        }
                    },
                }
            }
        });
        receiver
    }

    fn receive(
        &self,
        socket: TcpStream,
        permits: &Arc<Semaphore>,
        over: &watch::Receiver<bool>,
        connections: &mpsc::Sender<Connection>,
    ) {
        let Ok(permit) = Arc::clone(permits).try_acquire_owned() else {
            tracing::warn!(connections_max = self.limits.connections_max, "connection refused: too many are open");
            return;
        };
        if let Err(error) = tune(&socket, &self.limits) {
            tracing::warn!(%error, "connection refused: its socket takes no options");
            return;
        }
        let (tls, protocol, limits) = (self.tls.clone(), self.protocol, self.limits.clone());
        let (over, connections) = (over.clone(), connections.clone());
        tokio::spawn(async move {
            let addresses = (socket.local_addr().ok(), socket.peer_addr().ok());
            let transport = match tls {
                None => Transport::Plain(socket),
                Some(tls) => match tokio::time::timeout(limits.handshake_timeout, tls.accept(socket)).await {
                    Ok(Ok(stream)) => Transport::Tls(Box::new(stream)),
                    Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
                    Err(_) => return tracing::debug!("TLS handshake took too long"),
                },
            };
            let connection = Connection::new(transport, protocol, &limits, over, permit, addresses);
            // The receiver is gone only when the server is over.
            let _ = connections.send(connection).await;
        });
    }
}

/// No delay for small messages; probes, so that a peer that vanished without a word is noticed.
fn tune(socket: &TcpStream, limits: &ConnectionLimits) -> io::Result<()> {
    socket.set_nodelay(true)?;
    // The system counts these in seconds.
    let second = Duration::from_secs(1);
    let probe = socket2::TcpKeepalive::new()
        .with_time(limits.keepalive_interval.max(second))
        .with_interval(limits.keepalive_timeout.max(second))
        .with_retries(3);
    socket2::SockRef::from(socket).set_tcp_keepalive(&probe)
}

fn acceptor(tls: &Tls, protocol: Protocol) -> Result<TlsAcceptor, ServerError> {
    let pem = |path: &std::path::Path, error: rustls::pki_types::pem::Error| ServerError::Tls {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(&tls.cert_path).and_then(Iterator::collect);
    let chain = chain.map_err(|error| pem(&tls.cert_path, error))?;
    let key = PrivateKeyDer::from_pem_file(&tls.key_path).map_err(|error| pem(&tls.key_path, error))?;
    let refuse = |error: rustls::Error| ServerError::Tls { path: tls.cert_path.clone(), reason: error.to_string() };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(refuse)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(refuse)?;
    config.alpn_protocols = vec![match protocol {
        Protocol::Http2 => b"h2".to_vec(),
        Protocol::Http1 => b"http/1.1".to_vec(),
    }];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// One connection. Its permit counts against `connections_max` for as long as it lives.
pub(crate) struct Connection {
    transport: Transport,
    /// Ends the connection when it completes; `None` once it has.
    end: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// Until the first frame.
    handshake: Option<Pin<Box<Sleep>>>,
    guard: Option<FrameGuard>,
    /// Bytes of [`FORBIDDEN_FRAME`] handed to the reader, once there was a flood.
    forbidden: Option<usize>,
    addresses: (Option<SocketAddr>, Option<SocketAddr>),
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    fn new(
        transport: Transport,
        protocol: Protocol,
        limits: &ConnectionLimits,
        over: watch::Receiver<bool>,
        permit: OwnedSemaphorePermit,
        addresses: (Option<SocketAddr>, Option<SocketAddr>),
    ) -> Self {
        let age_max = match protocol {
            // tonic asks a connection to end at `age_max`; this is for the peer that does not listen.
            Protocol::Http2 => limits.age_max.saturating_add(limits.age_grace),
            Protocol::Http1 => limits.http_age_max,
        };
        let budget = Budget { burst: limits.control_frames_burst, per_second: limits.control_frames_per_second };
        let http2 = protocol == Protocol::Http2;
        Self {
            transport,
            end: Some(Box::pin(async move {
                let _ = tokio::time::timeout(age_max, is_true(over)).await;
            })),
            handshake: http2.then(|| Box::pin(tokio::time::sleep(limits.handshake_timeout))),
            guard: http2.then(|| FrameGuard::new(budget)),
            forbidden: None,
            addresses,
            _permit: permit,
        }
    }

    fn read_transport(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(socket) => Pin::new(socket).poll_read(cx, buf),
            Transport::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }

    fn inspect(&mut self, buf: &mut ReadBuf<'_>, from: usize) {
        let Some(guard) = &mut self.guard else { return };
        if let Some(end) = guard.read(&buf.filled()[from..], Instant::now()) {
            tracing::debug!(peer = ?self.addresses.1, "connection closed: a flood of control frames");
            buf.set_filled(from + end);
            self.forbidden = Some(0);
        }
        if guard.frames_seen() {
            self.handshake = None;
        }
    }

    /// Hands out what remains of the forbidden frame, then the end of the stream.
    fn read_forbidden(&mut self, sent: usize, buf: &mut ReadBuf<'_>) {
        let part = (FORBIDDEN_FRAME.len() - sent).min(buf.remaining());
        buf.put_slice(&FORBIDDEN_FRAME[sent..sent + part]);
        self.forbidden = Some(sent + part);
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(sent) = this.forbidden {
            this.read_forbidden(sent, buf);
            return Poll::Ready(Ok(()));
        }
        let from = buf.filled().len();
        match this.read_transport(cx, buf) {
            Poll::Ready(result) => {
                result?;
                this.inspect(buf, from);
                // A flood may end with nothing before the forbidden frame; an empty read would look like the peer's end.
                if let Some(sent) = this.forbidden
                    && buf.filled().len() == from
                {
                    this.read_forbidden(sent, buf);
                }
                Poll::Ready(Ok(()))
            }
            Poll::Pending => {
                if let Some(handshake) = &mut this.handshake
                    && handshake.as_mut().poll(cx).is_ready()
                {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "no HTTP/2 frame came in time")));
                }
                if let Some(end) = &mut this.end {
                    ready!(end.as_mut().poll(cx));
                    this.end = None;
                }
                Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()))
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.as_mut().poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(match &mut self.transport {
            Transport::Plain(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
            Transport::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        })?;
        if let Some(guard) = &mut self.guard {
            let mut rest = written;
            for slice in slices {
                let part = rest.min(slice.len());
                guard.wrote(&slice[..part]);
                rest -= part;
            }
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Plain(socket) => socket.is_write_vectored(),
            Transport::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        TcpConnectInfo { local_addr: self.addresses.0, remote_addr: self.addresses.1 }
    }
}

/// Lets axum take connections from a [`Door`].
pub(crate) struct HttpListener {
    pub(crate) connections: mpsc::Receiver<Connection>,
    pub(crate) addr: SocketAddr,
}

impl axum::serve::Listener for HttpListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        match self.connections.recv().await {
            Some(connection) => {
                let peer = connection.addresses.1.unwrap_or(self.addr);
                (connection, peer)
            }
            // The door is closed; axum's own shutdown signal ends the wait.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.addr)
    }
}
