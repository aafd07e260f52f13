//! Connections to the servers: accepted, bounded, and closed where nobody asks.
//!
//! `axum::serve` does neither: whoever connects and says nothing keeps a connection for ever.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;

/// How long a server waits for the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For the head of the next request.
    pub head: Duration,
    /// Until more of an answer is taken up.
    pub answer: Duration,
}

impl Default for Patience {
    /// Clients that keep connections for later give them up sooner, or connect anew.
    fn default() -> Self {
        Self {
            head: Duration::from_secs(30),
            answer: Duration::from_secs(60),
        }
    }
}

/// Connections at a time; the system holds the next ones back. Half of the 1,024 files that a process
/// may commonly have open.
const CONNECTIONS: usize = 512;

/// Answers requests by `router` until `end` comes, which is returned, and then for `grace` at most
/// those that are being answered. A connection is closed where `patience` is at its end.
pub(crate) async fn serve<T>(
    mut listener: TcpListener,
    router: Router,
    patience: Patience,
    grace: Duration,
    end: impl Future<Output = T>,
) -> T {
    let mut builder = Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(patience.head);
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let connections = GracefulShutdown::new();
    let mut end = pin!(end);
    let outcome = loop {
        let next = async {
            let place = Arc::clone(&room).acquire_owned().await;
            (place, Listener::accept(&mut listener).await.0)
        };
        let (place, stream) = tokio::select! {
            next = next => next,
            outcome = &mut end => break outcome,
        };
        // Pieces of a stream are small, and would wait for the client to confirm the last one.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(patience.answer));
        let stream = TokioIo::new(Box::pin(stream));
        let service = TowerToHyperService::new(router.clone());
        let connection = builder.serve_connection(stream, service);
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            // What went wrong in it is the client's, or of its network.
            let _ = connection.await;
            drop(place);
        });
    };
    // Before answers are waited for: those who connect from now on should learn that nobody is there.
    drop(listener);
    let _ = timeout(grace, connections.shutdown()).await;
    outcome
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{SocketAddr, TcpStream};
    use std::thread::sleep;
    use std::time::Instant;

    use axum::routing::get;
    use tokio::sync::oneshot::{self, Sender};
    use tokio::task::JoinHandle;

    use super::*;

    const SHORT: Duration = Duration::from_millis(200);
    const LONG: Duration = Duration::from_secs(20);
    /// More than the system keeps for who does not read.
    const LARGE: usize = 64 << 20;
    const REQUEST: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";

    /// A server whose answers take three times as long as it waits for heads; what ends it.
    async fn start() -> (SocketAddr, Sender<u8>, JoinHandle<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let answer = || async {
            tokio::time::sleep(SHORT * 3).await;
            "done"
        };
        let (end, ended) = oneshot::channel();
        let end_comes = async { ended.await.expect("tests end servers") };
        let long = || async { vec![0u8; LARGE] };
        let router = Router::new()
            .route("/", get(answer))
            .route("/long", get(long));
        let patience = Patience {
            head: SHORT,
            // Long enough for a reader on a busy machine.
            answer: SHORT * 10,
        };
        let server = tokio::spawn(serve(listener, router, patience, LONG, end_comes));
        (address, end, server)
    }

    /// A connection on which so much was said.
    fn say(address: SocketAddr, text: &str) -> TcpStream {
        let mut connection = TcpStream::connect(address).expect("a connection");
        connection.write_all(text.as_bytes()).expect("it is sent");
        connection
    }

    /// What comes until the server closes the connection.
    fn rest(mut connection: TcpStream) -> String {
        let mut text = String::new();
        connection
            .set_read_timeout(Some(LONG))
            .expect("it can be set");
        connection
            .read_to_string(&mut text)
            .expect("the server closes the connection");
        text
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn who_says_nothing_is_let_go() {
        let (address, _end, _) = start().await;
        for beginning in ["", "GET / HTTP/1.1\r\nHost: a\r\n"] {
            assert_eq!(rest(say(address, beginning)), "", "{beginning:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn who_waits_for_an_answer_is_not() {
        let (address, _end, _) = start().await;
        let asked = Instant::now();
        // After it the connection is kept for another request, and let go as none comes.
        assert!(rest(say(address, REQUEST)).ends_with("done"));
        assert!(asked.elapsed() >= SHORT * 4);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn who_does_not_read_is_let_go() {
        let (address, _end, _) = start().await;
        let request = REQUEST.replace("/ ", "/long ");
        let mut connection = say(address, &request);
        sleep(SHORT * 20);
        let mut got = 0;
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count @ 1..) = connection.read(&mut buffer) {
            got += count;
        }
        assert!(got < LARGE, "{got} bytes");
        // Who reads gets all of it.
        let mut connection = say(address, &request);
        let mut answer = Vec::new();
        connection
            .read_to_end(&mut answer)
            .expect("it is closed after it");
        assert!(answer.len() > LARGE);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn answers_are_finished_at_the_end() {
        let (address, end, server) = start().await;
        let connection = say(address, REQUEST);
        sleep(SHORT);
        end.send(7).expect("the server is there");
        assert!(rest(connection).ends_with("done"));
        assert_eq!(server.await.expect("it does not panic"), 7);
        TcpStream::connect(address).expect_err("nobody listens");
    }
}
