//! The HTTP server under the admin interface. Whoever connects and says nothing, or half a request for ever, must take neither
//! the process's descriptors nor the time that its end may take.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// What callers may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Connections at a time; others wait in the listener's queue.
    pub connections: usize,
    /// How long a connection may take for the head of its next request.
    pub head: Duration,
    /// How long requests may go on when the interface ends.
    pub end: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            connections: 64,
            head: Duration::from_secs(5),
            end: Duration::from_secs(1),
        }
    }
}

/// Between two tries to accept, when there is no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `shutdown` is done and the requests at hand are answered or their time is over.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    patience: Patience,
    shutdown: impl Future<Output = ()> + Send + 'static,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(patience.head);
    let room = Arc::new(Semaphore::new(patience.connections));
    let ending = GracefulShutdown::new();
    // Dropped at the end, it ends what is left.
    let mut callers = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        while callers.try_join_next().is_some() {}
        let next = async {
            let slot = room.clone().acquire_owned().await.map_err(io::Error::other)?;
            let (stream, _) = listener.accept().await?;
            Ok::<_, io::Error>((slot, stream))
        };
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = next => accepted,
        };
        match accepted {
            Ok((slot, stream)) => {
                let service = TowerToHyperService::new(router.clone());
                let connection = ending.watch(http.serve_connection(TokioIo::new(stream), service));
                callers.spawn(async move {
                    // How it ended is the caller's affair.
                    let _ = connection.await;
                    drop(slot);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
    drop(listener);
    // What takes longer is cut off.
    let _ = tokio::time::timeout(patience.end, ending.shutdown()).await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::time::timeout;

    use super::*;

    /// Long enough for anything that comes, short enough for a test that hangs.
    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn half_requests_take_neither_all_connections_nor_the_time_of_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (end, ending) = tokio::sync::oneshot::channel::<()>();
        let patience = Patience {
            connections: 2,
            head: Duration::from_millis(200),
            end: Duration::from_millis(200),
        };
        let router = Router::new().route("/", get(async || "ok"));
        let router = router.route("/for-ever", get(async || std::future::pending::<()>().await));
        let served = tokio::spawn(serve(listener, router, patience, async move { drop(ending.await) }));

        let half = async || {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n").await.unwrap();
            stream
        };
        let _halves = [half().await, half().await, half().await];
        let mut whole = TcpStream::connect(address).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        whole.write_all(request).await.unwrap();
        let mut answer = String::new();
        timeout(LIMIT, whole.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok"), "{answer}");

        let mut without_end = TcpStream::connect(address).await.unwrap();
        without_end
            .write_all(b"GET /for-ever HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        let _half = half().await;
        end.send(()).unwrap();
        timeout(LIMIT, served).await.unwrap().unwrap();
    }
}
