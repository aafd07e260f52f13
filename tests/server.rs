//! `serve` answers as OpenAI's completions do, refuses what it should, and lets go of what nobody
//! waits for.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::{Workspace, wait_until};
use serde_json::{Value, json};

/// A server at work; it is killed when the value is dropped.
struct Server {
    child: Child,
    port: u16,
    _workspace: Workspace,
}

/// An answer.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The text of an error.
    #[track_caller]
    fn message(&self) -> String {
        let message = &self.json()["error"]["message"];
        message.as_str().expect("an error has a message").to_owned()
    }

    /// The events of a stream but the last, which has to be `[DONE]`.
    #[track_caller]
    fn events(&self) -> Vec<Value> {
        let mut events: Vec<&str> = self
            .body
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{}", self.body);
        let parse = |event: &str| serde_json::from_str(event).expect("events are JSON");
        events.into_iter().map(parse).collect()
    }
}

impl Server {
    /// Serves a model that has learnt a little.
    fn start(arguments: &str) -> Self {
        let workspace = Workspace::new();
        workspace.train("run", &[], "");
        let line = format!("serve --checkpoint checkpoints/run --device cpu --port 0 {arguments}");
        let mut child = workspace
            .command(&line)
            .spawn()
            .expect("the program starts");
        let mut said = String::new();
        let stdout = child.stdout.take().expect("its output is caught");
        BufReader::new(stdout).read_line(&mut said).expect("a line");
        let port = said
            .trim()
            .strip_prefix("http://127.0.0.1:")
            .and_then(|rest| rest.strip_suffix("/v1"))
            .and_then(|port| port.parse().ok())
            .unwrap_or_else(|| panic!("no address: {said:?}"));
        Self {
            child,
            port,
            _workspace: workspace,
        }
    }

    /// Opens a connection and sends a request with these headers and no others.
    fn send(&self, line: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("it listens");
        let timeout = Some(Duration::from_secs(60));
        stream.set_read_timeout(timeout).expect("a socket");
        let mut text = format!("{line} HTTP/1.1\r\nConnection: close\r\n");
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        text += &format!("Content-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all(text.as_bytes()).expect("sent");
        stream
    }

    fn ask(&self, line: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        read(self.send(line, headers, body))
    }

    fn get(&self, path: &str) -> Answer {
        self.ask(&format!("GET {path}"), &[("Host", "localhost")], "")
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask(&format!("POST {path}"), &JSON, &body.to_string())
    }

    fn complete(&self, body: Value) -> Answer {
        let mut request = json!({ "model": "mambabyte" });
        for (key, value) in body.as_object().expect("an object") {
            request[key] = value.clone();
        }
        self.post("/v1/completions", &request)
    }

    /// Requests that would be taken.
    fn room(&self) -> u64 {
        self.get("/health").json()["room"]
            .as_u64()
            .expect("a number")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const JSON: [(&str, &str); 2] = [("Host", "localhost"), ("Content-Type", "application/json")];

/// Reads an answer to its end.
fn read(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    // A server that refuses a body closes before it has read it: what it said is still there.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).expect("answers are text");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|it| it.parse().ok());
    let chunked = head
        .to_ascii_lowercase()
        .contains("transfer-encoding: chunked");
    Answer {
        status: status.unwrap_or_else(|| panic!("no status: {text:?}")),
        head: head.to_ascii_lowercase(),
        body: if chunked {
            joined(body)
        } else {
            body.to_owned()
        },
    }
}

/// The body behind HTTP's chunks.
fn joined(mut chunks: &str) -> String {
    let mut body = String::new();
    while let Some((size, rest)) = chunks.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("a chunk's size");
        body += &rest[..size];
        chunks = rest[size..].trim_start_matches("\r\n");
    }
    body
}

#[track_caller]
fn numbers(value: &Value) -> Vec<Option<f64>> {
    let list = value
        .as_array()
        .unwrap_or_else(|| panic!("no list: {value}"));
    list.iter().map(Value::as_f64).collect()
}

/// What lm-evaluation-harness sends for log-likelihoods, and what it asks of the answer.
#[test]
fn scoring_is_as_the_harness_needs_it() {
    let server = Server::start("");
    let texts = ["the river walks", "a", "under light\nand \u{e9}"];
    let ids: Vec<Value> = texts.iter().map(|text| json!(text.as_bytes())).collect();
    let request = |prompt: Value| {
        server.complete(json!({
            "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
            "echo": true,
        }))
    };
    let answer = request(json!(ids));
    assert_eq!(answer.status, 200, "{}", answer.body);
    let by_ids = answer.json();
    let by_text = request(json!(texts)).json();
    assert_eq!(by_ids["usage"]["prompt_tokens"], 15 + 1 + 18);
    assert_eq!(by_ids["usage"]["completion_tokens"], 3);
    for (index, text) in texts.iter().enumerate() {
        let choice = &by_ids["choices"][index];
        assert_eq!(choice["index"], index);
        assert_eq!(choice["logprobs"], by_text["choices"][index]["logprobs"]);
        let log_probs = numbers(&choice["logprobs"]["token_logprobs"]);
        let top = choice["logprobs"]["top_logprobs"]
            .as_array()
            .expect("a list");
        assert_eq!(log_probs.len(), text.len() + 1, "the prompt and one byte");
        assert_eq!(top.len(), text.len() + 1);
        assert_eq!(log_probs[0], None);
        for (log_prob, top) in log_probs.iter().zip(top).skip(1) {
            let (log_prob, top) = (log_prob.expect("a number"), top.as_object().expect("a map"));
            assert_eq!(top.len(), 1);
            let best = top
                .values()
                .next()
                .and_then(Value::as_f64)
                .expect("a number");
            assert!(log_prob <= best && best <= 0.0, "{log_prob} {best}");
        }
        // The byte it wrote is the likeliest: the same number in both places.
        let best = top[text.len()].as_object().expect("a map").values().next();
        assert_eq!(best.and_then(Value::as_f64), log_probs[text.len()]);
        assert!(choice["text"].as_str().expect("a text").starts_with(text));
        let offsets = choice["logprobs"]["text_offset"]
            .as_array()
            .expect("a list");
        assert_eq!(offsets.len(), text.len() + 1);
    }
    let tokens = &by_ids["choices"][2]["logprobs"]["tokens"];
    assert_eq!(tokens[0], "u");
    assert_eq!(tokens[16], "bytes:\\xc3");
}

/// `eval --save` computes the same log-probabilities another way.
#[test]
fn scores_are_those_of_eval() {
    let server = Server::start("");
    let text = "the night walks under the stone and slowly a bird";
    let workspace = &server._workspace;
    std::fs::write(workspace.path("one.txt"), text).expect("written");
    workspace.ok(
        "eval --checkpoint checkpoints/run --text one.txt --mode carried --device cpu --save out",
    );
    let bytes = std::fs::read(workspace.path("out/log_probs.npy")).expect("an array");
    let saved: Vec<f64> = bytes[bytes.len() - 4 * text.len()..]
        .chunks_exact(4)
        .map(|it| f64::from(f32::from_le_bytes([it[0], it[1], it[2], it[3]])))
        .collect();
    let answer = server.complete(json!({
        "prompt": text, "max_tokens": 0, "logprobs": 5, "echo": true,
    }));
    let choice = &answer.json()["choices"][0];
    let served = numbers(&choice["logprobs"]["token_logprobs"]);
    assert_eq!(served.len(), text.len());
    for (i, (served, saved)) in served.iter().zip(&saved).enumerate().skip(1) {
        let served = served.expect("a number");
        assert!(
            (served - saved).abs() < 1e-4,
            "byte {i}: {served} and {saved}"
        );
    }
    assert!((saved[0] + 256f64.ln()).abs() < 1e-6);
    let top = choice["logprobs"]["top_logprobs"][3]
        .as_object()
        .expect("a map");
    assert_eq!(top.len(), 5);
}

#[test]
fn texts_are_written_seeded_and_stopped() {
    let server = Server::start("");
    let write = |more: Value| {
        let mut body = json!({ "prompt": "the ", "max_tokens": 24, "seed": 7 });
        for (key, value) in more.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let answer = server.complete(body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    };
    let text = |answer: &Value, index: usize| -> String {
        let text = &answer["choices"][index]["text"];
        text.as_str().expect("a text").to_owned()
    };
    let one = write(json!({}));
    assert_eq!(one["choices"][0]["finish_reason"], "length");
    assert_eq!(one["usage"]["completion_tokens"], 24);
    assert_eq!(text(&one, 0), text(&write(json!({})), 0), "a seed repeats");
    assert_ne!(text(&one, 0), text(&write(json!({ "seed": 8 })), 0));

    let several = write(json!({ "n": 3 }));
    assert_eq!(
        text(&several, 0),
        text(&one, 0),
        "the first of several is the one alone"
    );
    assert_ne!(text(&several, 1), text(&several, 2));

    let greedy = write(json!({ "temperature": 0 }));
    let whole = text(&greedy, 0);
    let stop: String = whole.chars().skip(5).take(2).collect();
    let stopped = write(json!({ "temperature": 0, "stop": stop }));
    let at = whole.find(&stop).expect("it is in there");
    assert_eq!(text(&stopped, 0), whole[..at]);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");

    // Log-probabilities of what was written are those of a prompt that has it.
    let logged = write(json!({ "temperature": 0, "logprobs": 2 }));
    assert_eq!(text(&logged, 0), whole);
    let own = numbers(&logged["choices"][0]["logprobs"]["token_logprobs"]);
    assert_eq!(own.len(), 24);
    let echoed = server.complete(json!({
        "prompt": format!("the {whole}"), "max_tokens": 0, "logprobs": 2, "echo": true,
    }));
    let echoed = numbers(&echoed.json()["choices"][0]["logprobs"]["token_logprobs"]);
    for (a, b) in own.iter().zip(&echoed[4..]) {
        assert!((a.expect("a number") - b.expect("a number")).abs() < 1e-4);
    }
    let empty = write(json!({ "prompt": "", "logprobs": 1 }));
    let own = numbers(&empty["choices"][0]["logprobs"]["token_logprobs"]);
    assert!(own.len() == 24 && own.iter().all(Option::is_some));
    let echo = write(json!({ "temperature": 0, "echo": true }));
    assert_eq!(text(&echo, 0), format!("the {whole}"));
}

#[test]
fn a_stream_is_the_whole_in_pieces() {
    let server = Server::start("");
    let body = json!({
        "prompt": ["the ", "a "], "max_tokens": 60, "seed": 3, "logprobs": 1, "temperature": 1.0,
    });
    let whole = server.complete(body.clone()).json();
    let mut streamed = body;
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({ "include_usage": true });
    let answer = server.complete(streamed);
    assert!(
        answer.head.contains("content-type: text/event-stream"),
        "{}",
        answer.head
    );
    let mut events = answer.events();
    let usage = events.pop().expect("a last piece");
    assert_eq!(usage["usage"]["completion_tokens"], 120);
    assert!(events.len() > 4, "it comes in pieces");
    for index in 0..2 {
        let own: Vec<&Value> = events
            .iter()
            .map(|event| &event["choices"][0])
            .filter(|choice| choice["index"] == index)
            .collect();
        let text: String = own.iter().filter_map(|it| it["text"].as_str()).collect();
        assert_eq!(whole["choices"][index]["text"], text);
        assert_eq!(own.last().expect("pieces")["finish_reason"], "length");
        let streamed: Vec<f64> = own
            .iter()
            .flat_map(|it| numbers(&it["logprobs"]["token_logprobs"]))
            .map(|it| it.expect("a number"))
            .collect();
        let scored = numbers(&whole["choices"][index]["logprobs"]["token_logprobs"]);
        assert_eq!(streamed.len(), scored.len());
        let offsets = own
            .iter()
            .flat_map(|it| numbers(&it["logprobs"]["text_offset"]));
        let offsets: Vec<Option<f64>> = offsets.collect();
        let whole = &whole["choices"][index]["logprobs"]["text_offset"];
        assert_eq!(offsets, numbers(whole), "they count through the text");
        for (a, b) in streamed.iter().zip(scored) {
            assert!((a - b.expect("a number")).abs() < 1e-3, "{a} {b:?}");
        }
    }
}

#[test]
fn tokens_are_bytes() {
    let server = Server::start("--name other");
    let info = server.get("/tokenizer_info").json();
    assert_eq!(info["eos_token"], "\0");
    let text = "a\u{e9}\0\u{1f600}";
    let tokens = server.post(
        "/tokenize",
        &json!({ "prompt": text, "add_special_tokens": false }),
    );
    assert_eq!(tokens.json()["tokens"], json!(text.as_bytes()));
    let back = server.post("/detokenize", &json!({ "tokens": text.as_bytes() }));
    assert_eq!(back.json()["prompt"], text);
    let cut = server.post("/detokenize", &json!({ "tokens": [97, 0xe2, 0x82] }));
    assert_eq!(cut.json()["prompt"], "a\u{fffd}");
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "other");
    assert_eq!(server.get("/v1/models/other").status, 200);
    assert_eq!(server.get("/v1/models/x").status, 404);
    assert_eq!(server.get("/health").json()["status"], "ok");
}

#[test]
fn what_cannot_be_met_is_refused_with_a_reason() {
    let server = Server::start("--max-prompt-bytes 1000 --max-new-bytes 50");
    let long = "x".repeat(1001);
    for (body, status, words) in [
        (json!({}), 400, "prompt"),
        (
            json!({ "prompt": "a", "model": "gpt" }),
            404,
            "no model `gpt`",
        ),
        (json!({ "prompt": [256] }), 400, "token id 256"),
        (json!({ "prompt": [] }), 400, "empty list"),
        (json!({ "prompt": long }), 400, "1001"),
        (json!({ "prompt": &long[..600], "n": 2 }), 400, "is 1200"),
        (
            json!({ "prompt": "a", "n": 21, "max_tokens": 50, "logprobs": 1 }),
            400,
            "is 1050",
        ),
        (
            json!({ "prompt": "a", "max_tokens": 51 }),
            400,
            "max_tokens is 51",
        ),
        (json!({ "prompt": "a", "max_tokens": -1 }), 400, "-1"),
        (
            json!({ "prompt": "a", "logprobs": 6 }),
            400,
            "logprobs is 6",
        ),
        (
            json!({ "prompt": "a", "temperature": -1 }),
            400,
            "temperature is -1",
        ),
        (json!({ "prompt": "a", "top_p": 2 }), 400, "top_p is 2"),
        (json!({ "prompt": "a", "top_k": 257 }), 400, "top_k is 257"),
        (json!({ "prompt": "a", "n": 257 }), 400, "n is 257"),
        (json!({ "prompt": ["a", "b"], "n": 200 }), 400, "400"),
        (json!({ "prompt": "a", "stop": "" }), 400, "stop string"),
        (json!({ "prompt": "a", "stop": vec!["x"; 17] }), 400, "17"),
        (json!({ "prompt": "a", "suffix": "b" }), 400, "`suffix`"),
        (json!({ "prompt": "a", "best_of": 2 }), 400, "`best_of`"),
        (
            json!({ "prompt": "a", "presence_penalty": 1.0 }),
            400,
            "`presence_penalty`",
        ),
        (
            json!({ "prompt": "a", "logit_bias": { "5": 1 } }),
            400,
            "`logit_bias`",
        ),
        (json!({ "prompt": "a", "num_beams": 2 }), 400, "num_beams"),
        (
            json!({ "prompt": "a", "stream": true, "logprobs": 2 }),
            400,
            "streamed",
        ),
    ] {
        let answer = server.complete(body.clone());
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        assert!(answer.message().contains(words), "{body}: {}", answer.body);
    }
    for (path, body) in [
        ("/tokenize", json!({ "prompt": long })),
        ("/detokenize", json!({ "tokens": long.as_bytes() })),
    ] {
        let answer = server.post(path, &body);
        assert_eq!(answer.status, 400, "{path}");
        assert!(answer.message().contains("1001"), "{}", answer.body);
    }
    let broken = server.ask("POST /v1/completions", &JSON, "{\"prompt\": ");
    assert_eq!((broken.status, broken.message().is_empty()), (400, false));
    let huge = "x".repeat(100_000);
    assert_eq!(server.ask("POST /v1/completions", &JSON, &huge).status, 413);
    assert_eq!(server.get("/etc/passwd").status, 404);
    assert_eq!(server.get("/v1/../../etc/passwd").status, 404);
    assert_eq!(server.get("/v1/completions").status, 405);
    // What harmless clients send along is taken.
    let answer = server.complete(json!({
        "prompt": "a", "max_tokens": 1, "user": "me", "suffix": null, "best_of": 1,
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "stream": null,
    }));
    assert_eq!(answer.status, 200, "{}", answer.body);
}

#[test]
fn pages_from_elsewhere_are_not_served() {
    let server = Server::start("");
    let ask = |headers: &[(&str, &str)]| server.ask("GET /v1/models", headers, "");
    for host in ["localhost", "127.0.0.1:8000", "127.0.0.2:8000", "[::1]:9"] {
        let answer = ask(&[("Host", host)]);
        assert_eq!(answer.status, 200, "{host}");
        for header in ["x-content-type-options: nosniff", "cache-control: no-store"] {
            assert!(answer.head.contains(header), "{}", answer.head);
        }
        assert!(!answer.head.contains("access-control"), "{}", answer.head);
    }
    for host in ["evil.example", "localhost.evil.example:8000", "0.0.0.0"] {
        assert_eq!(ask(&[("Host", host)]).status, 403, "{host}");
    }
    // Two names: whoever is in between may go by the other one.
    let two = [("Host", "localhost"), ("Host", "evil.example")];
    assert_eq!(ask(&two).status, 403);
    let two = [
        ("Host", "localhost"),
        ("Origin", "http://localhost"),
        ("Origin", "http://evil.example"),
    ];
    assert_eq!(ask(&two).status, 403);
    for (origin, status) in [
        ("http://localhost:3000", 200),
        ("http://evil.example", 403),
        ("null", 403),
    ] {
        let answer = ask(&[("Host", "localhost"), ("Origin", origin)]);
        assert_eq!(answer.status, status, "{origin}");
    }
    // A form of a page can post without asking, but not with this type.
    let form = [("Host", "localhost"), ("Content-Type", "text/plain")];
    let body = json!({ "prompt": "a" }).to_string();
    assert_eq!(server.ask("POST /tokenize", &form, &body).status, 415);
}

#[test]
fn a_key_is_asked_for() {
    let workspace = Workspace::new();
    workspace.train("run", &[], "");
    let serve = "serve --checkpoint checkpoints/run --device cpu --port 0";
    workspace.fails(
        &format!("{serve} --host 0.0.0.0"),
        2,
        &["no key", "--key-file"],
    );
    std::fs::write(workspace.path("short"), "abc\n").expect("written");
    workspace.fails(&format!("{serve} --key-file short"), 2, &["16 printable"]);
    workspace.fails(&format!("{serve} --key-file none"), 2, &["none"]);

    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("key");
    std::fs::write(&file, "0123456789abcdef\n").expect("written");
    let server = Server::start(&format!("--key-file {}", file.display()));
    let ask = |authorization: &str| {
        let headers = [("Host", "localhost"), ("Authorization", authorization)];
        server.ask("GET /health", &headers, "").status
    };
    assert_eq!(ask("Bearer 0123456789abcdef"), 200);
    assert_eq!(ask("bearer 0123456789abcdef"), 200);
    for wrong in ["", "Bearer", "Bearer 0123456789abcdeg", "0123456789abcdef"] {
        assert_eq!(ask(wrong), 401, "{wrong:?}");
    }
}

/// More requests than there is room for are told so at once; room comes back when clients go.
#[test]
fn a_full_queue_says_so_and_gone_clients_make_room() {
    let server = Server::start("--queue 2 --max-new-bytes 100000000");
    let endless = json!({
        "model": "mambabyte", "prompt": "the ", "max_tokens": 100_000_000, "temperature": 1.0,
    });
    let streaming = {
        let mut body = endless.clone();
        body["stream"] = json!(true);
        server.send("POST /v1/completions", &JSON, &body.to_string())
    };
    let waiting = server.send("POST /v1/completions", &JSON, &endless.to_string());
    wait_until("both are taken", || server.room() == 0);
    let refused = server.post("/v1/completions", &endless);
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.head.contains("retry-after: 1"), "{}", refused.head);
    drop(waiting);
    drop(streaming);
    wait_until("both are given up", || server.room() == 2);
    let answer = server.complete(json!({ "prompt": "a", "max_tokens": 3 }));
    assert_eq!(answer.status, 200, "{}", answer.body);
}

/// Bodies that do not come to their end have places like all others, so that they cannot fill memory.
#[test]
fn bodies_on_their_way_are_bounded() {
    let server = Server::start("--queue 2");
    let half = |path: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", server.port)).expect("it listens");
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: 1000\r\n\r\n{{"
        );
        stream.write_all(head.as_bytes()).expect("sent");
        stream
    };
    let begun = [half("/v1/completions"), half("/tokenize")];
    wait_until("both are taken", || server.room() == 0);
    let refused = server.post("/tokenize", &json!({ "prompt": "a" }));
    assert_eq!(refused.status, 429, "{}", refused.body);
    drop(begun);
    wait_until("both are given up", || server.room() == 2);
    let answer = server.post("/tokenize", &json!({ "prompt": "a" }));
    assert_eq!(answer.status, 200, "{}", answer.body);
}

/// Scoring goes on while a long text is written.
#[test]
fn short_requests_do_not_wait_for_long_ones() {
    let server = Server::start("--max-new-bytes 100000000");
    let long = json!({
        "model": "mambabyte", "prompt": "the ", "max_tokens": 100_000_000, "stream": true,
    });
    let mut stream = server.send("POST /v1/completions", &JSON, &long.to_string());
    let mut some = [0; 512];
    stream.read_exact(&mut some).expect("it writes");
    let answer = server.complete(json!({
        "prompt": "the river", "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true,
    }));
    assert_eq!(answer.status, 200);
    stream.read_exact(&mut some).expect("it still writes");
}

#[test]
fn a_deadline_ends_what_takes_too_long() {
    let server = Server::start("--deadline 1 --max-new-bytes 100000000");
    let endless = json!({ "prompt": "the ", "max_tokens": 100_000_000 });
    let began = Instant::now();
    let answer = server.complete(endless.clone());
    assert_eq!(answer.status, 504, "{}", answer.body);
    assert!(began.elapsed() < Duration::from_secs(20));
    let mut streamed = endless;
    streamed["stream"] = json!(true);
    let answer = server.complete(streamed);
    assert_eq!(answer.status, 200);
    let last = answer.body.lines().rfind(|line| line.starts_with("data: "));
    assert!(
        last.is_some_and(|line| line.contains("time ran out")),
        "{last:?}"
    );
    // A body that never comes.
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).expect("it listens");
    let head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                Content-Length: 10\r\nConnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).expect("sent");
    assert_eq!(read(stream).status, 504);
    wait_until("all is given up", || server.room() == 64);
}

#[cfg(unix)]
#[test]
fn a_signal_ends_it_well() {
    for name in ["INT", "TERM"] {
        let mut server = Server::start("");
        let sent = Command::new("kill")
            .args(["-s", name, &server.child.id().to_string()])
            .status()
            .expect("kill is there");
        assert!(sent.success());
        assert_eq!(
            server.child.wait().expect("it ends").code(),
            Some(0),
            "{name}"
        );
    }
}

#[test]
fn a_port_in_use_is_an_error() {
    let server = Server::start("");
    let line = format!(
        "serve --checkpoint checkpoints/run --device cpu --port {}",
        server.port
    );
    server
        ._workspace
        .fails(&line, 2, &["cannot listen", "--port"]);
}
