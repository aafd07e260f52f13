//! What needs more than one of the files.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::answer::Header;
use super::api::Order;
use super::stream::stream;
use super::worker::Ticket;
use super::*;
use crate::config::MambaConfig;
use crate::generate::Request;

/// A model that knows so many byte values; it fails where it reads another.
pub(super) fn loaded(vocabulary: usize) -> Loaded {
    let device = Device::flex();
    let config = MambaConfig {
        vocab_size: vocabulary,
        ..MambaConfig::new(8, 1)
    };
    Loaded {
        model: config.init_lm(1, &device),
        device,
        precision: Precision::Fp32,
    }
}

/// A ticket that needs no worker.
pub(super) fn ticket() -> Ticket {
    let permit = Arc::new(Semaphore::new(1)).try_acquire_owned();
    Ticket {
        _permit: Arc::new(permit.expect("there is one")),
    }
}

fn options() -> ServerOptions {
    ServerOptions {
        host: Ipv4Addr::LOCALHOST.into(),
        port: 0,
        name: "m".to_owned(),
        key: None,
        limits: Limits::default(),
    }
}

/// A server whose model fails is no server: it ends with an error, so that it can be started again.
#[test]
fn a_server_ends_with_its_model() {
    let (told, ready) = mpsc::channel();
    let (ended, end) = mpsc::channel();
    thread::spawn(move || {
        let ready = |address| {
            let _ = told.send(address);
            Ok(())
        };
        let _ = ended.send(serve(options(), || Ok(loaded(2)), ready));
    });
    let minute = Duration::from_secs(60);
    let address: SocketAddr = ready.recv_timeout(minute).expect("it listens");
    let mut client = TcpStream::connect(address).expect("it listens");
    let body = json!({ "model": "m", "prompt": "a" }).to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    client.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 500"), "{answer}");
    let error = end.recv_timeout(minute).expect("it ends");
    let error = error.expect_err("it failed");
    assert_eq!(error.exit_code(), 1);
    assert!(error.report().contains("start the server again"), "{error}");
    assert!(TcpStream::connect(address).is_err(), "nobody listens");
}

/// A client that keeps its connection and does not read has its place until the deadline, not longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_read_ends_at_the_deadline() {
    let (worker, _ended) = Worker::spawn(|| Ok(loaded(256)), 1).await.expect("a model");
    let app = Arc::new(Shared {
        options: options(),
        worker,
        next: AtomicU64::new(0),
        started: 0,
    });
    let ticket = app.worker.enter().expect("room");
    let order = Order {
        requests: Request::new("a").samples(128),
        echo: false,
        logprobs: None,
        stream: true,
        include_usage: false,
        deadline: Instant::now() + Duration::from_secs(1),
    };
    let header = Header::new(&app);
    let response = stream(&app, ticket, order, header).expect("it begins");
    // By now all is written.
    sleep(Duration::from_millis(800)).await;
    assert_eq!(app.worker.room(), 0, "what is not read takes room");
    let room = async {
        while app.worker.room() == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    let minute = Duration::from_secs(60);
    timeout(minute, room).await.expect("it is given up");
    let body = axum::body::to_bytes(response.into_body(), usize::MAX);
    let body = timeout(minute, body)
        .await
        .expect("an end")
        .expect("a body");
    let events = body.windows(6).filter(|it| it == b"data: ").count();
    assert!(events < 128, "{events}");
}
