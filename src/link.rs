//! The relay's end of a connection before it is a session: dialling, proving who both ends are, and greeting.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::config::Compression;
use crate::memcached::MAX_KEY_BYTES;
use crate::relay::{FlowShared, ITEM_OVERHEAD, SessionTerms};
use crate::telemetry::RateLimit;
use crate::tls::{TlsMaterial, server_name};
use crate::wire::{self, CacheStatus, Decoder, FEATURE_LZ4, Frame, Hello, HelloAck, Limits, WireError};

/// Why a session could not begin, or ended. All of it is retried, without end.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer could not be reached, or the connection broke.
    #[error("connection: {0}")]
    Io(#[from] std::io::Error),
    /// No session within the time.
    #[error("no session within {0:?}")]
    Timeout(Duration),
    /// The peer's identity is not what it should be.
    #[error("tls: {0}")]
    Tls(#[from] crate::tls::TlsError),
    /// The peer sent something that makes no sense.
    #[error("protocol: {0}")]
    Wire(#[from] WireError),
    /// The peer refused the session.
    #[error("refused by peer: {0}")]
    Refused(String),
    /// The peer ended the session.
    #[error("peer closed the session")]
    Closed,
    /// Nothing was heard for the idle timeout.
    #[error("nothing heard for {0:?}")]
    Silent(Duration),
    /// The peer lives but acks nothing.
    #[error("pings are answered, but nothing was acked for {0:?}")]
    NoAcks(Duration),
    /// The peer answered with a frame that has no place there.
    #[error("unexpected {0} frame")]
    Unexpected(&'static str),
}

/// What this end accepts of the peer: acks and small frames.
pub fn limits() -> Limits {
    Limits {
        // As many as an agent takes in a batch: each may be an exception.
        max_batch_items: 65_536,
        ..Limits::default()
    }
}

/// How this relay introduces itself.
pub fn hello(shared: &FlowShared) -> Hello {
    let config = &shared.config;
    let regions = std::iter::once(&config.region).chain(config.peers.iter().map(|peer| &peer.region));
    Hello {
        min_version: wire::VERSION,
        max_version: wire::VERSION,
        software: concat!("evrepl ", env!("CARGO_PKG_VERSION")).to_owned(),
        caches: shared.peer().caches.clone(),
        regions: regions.cloned().collect(),
        features: match config.batch.compression {
            Compression::Lz4 => vec![FEATURE_LZ4.to_owned()],
            Compression::None => Vec::new(),
        },
        max_frame_bytes: limits().max_frame_bytes,
    }
}

/// Said in each session of each lane otherwise.
static NOT_TAKEN: RateLimit = RateLimit::new();

/// What the greeting's answer means for the lane.
pub fn terms(shared: &FlowShared, ack: &HelloAck) -> SessionTerms {
    let mut accepted = vec![false; shared.config.caches.len()];
    for (name, status) in shared.peer().caches.iter().zip(&ack.caches) {
        if let Some(cache) = shared.config.caches.iter().position(|cache| cache.name == *name) {
            accepted[cache] = *status == CacheStatus::Accepted;
        }
        if *status != CacheStatus::Accepted
            && let Some(unsaid) = NOT_TAKEN.due(&format!("{} {name}", shared.view.name))
        {
            tracing::warn!(
                flow = shared.view.name,
                cache = name,
                ?status,
                unsaid,
                "peer does not take this cache, its keys wait"
            );
        }
    }
    let room = ack.max_frame_bytes.min(ack.max_batch_raw_bytes) as usize;
    SessionTerms {
        // A batch of one value must fit; larger ones are closed before they exceed what the peer takes.
        max_value: room.saturating_sub(wire::BATCH_OVERHEAD + ITEM_OVERHEAD + MAX_KEY_BYTES) as u64,
        max_batch: room.saturating_sub(wire::BATCH_OVERHEAD) as u64,
        lz4: ack.features.iter().any(|feature| feature == FEATURE_LZ4),
        accepted,
    }
}

/// Connects, proves who both ends are, and greets.
pub async fn connect(
    address: String,
    tls: Arc<TlsMaterial>,
    identity: String,
    hello: Hello,
) -> Result<(TlsStream<TcpStream>, BytesMut, HelloAck), LinkError> {
    let tcp = TcpStream::connect(&address).await?;
    tcp.set_nodelay(true)?;
    let mut stream = tls.connect(server_name(&identity)?, tcp).await?;
    let mut out = BytesMut::new();
    wire::encode(&Frame::Hello(hello), &mut out);
    stream.write_all(&out).await?;
    stream.flush().await?;
    let mut decoder = Decoder::new(limits());
    let mut buffer = BytesMut::with_capacity(4096);
    loop {
        match decoder.decode(&mut buffer)? {
            Some(Frame::HelloAck(ack)) if ack.version == wire::VERSION => return Ok((stream, buffer, ack)),
            Some(Frame::HelloAck(ack)) => return Err(LinkError::Refused(format!("wire version {}", ack.version))),
            Some(Frame::GoAway(away)) => return Err(LinkError::Refused(away.reason)),
            Some(_) => return Err(LinkError::Unexpected("greeting")),
            None => {}
        }
        if stream.read_buf(&mut buffer).await? == 0 {
            return Err(LinkError::Closed);
        }
    }
}
