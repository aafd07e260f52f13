//! The dashboard's server and the commands about metrics, as a process of their own. What a browser
//! makes of it is tested in `tests/dashboard/`.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{PROGRAM, Workspace, wait_until};
use serde_json::Value;

/// A dashboard at work on a free port.
struct Dash {
    child: Child,
    port: u16,
}

impl Dash {
    fn start(runs: &Path) -> Self {
        let mut child = Command::new(PROGRAM)
            .args(["dash", "--port", "0"])
            .arg(runs)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut said = BufReader::new(child.stderr.take().expect("caught"));
        let mut line = String::new();
        said.read_line(&mut line).expect("it says something");
        let port = line
            .split("localhost:")
            .nth(1)
            .and_then(|it| it.split('/').next()?.parse().ok());
        Self {
            child,
            port: port.unwrap_or_else(|| panic!("no address in {line:?}")),
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("it listens");
        let limit = Some(Duration::from_secs(30));
        stream.set_read_timeout(limit).expect("settable");
        stream
    }

    /// Status and whole answer of a request with these lines after the first.
    fn request(&self, first: &str, headers: &str) -> (u16, String) {
        let mut stream = self.connect();
        write!(
            stream,
            "{first} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n"
        )
        .expect("sent");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("an answer");
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let status = answer.split(' ').nth(1).and_then(|it| it.parse().ok());
        (status.unwrap_or(0), answer)
    }

    /// Status and answer of a GET as the page makes it.
    fn get(&self, path: &str) -> (u16, String) {
        let host = format!("Host: localhost:{}\r\n", self.port);
        self.request(&format!("GET {path}"), &host)
    }

    /// JSON of an address; chunks are not used for it.
    fn json(&self, path: &str) -> Value {
        let (status, answer) = self.get(path);
        assert_eq!(status, 200, "{path}: {answer}");
        let body = answer.split_once("\r\n\r\n").expect("a body").1;
        serde_json::from_str(body).unwrap_or_else(|e| panic!("{path}: {e}: {body}"))
    }

    fn run(&self, id: &str) -> Option<Value> {
        let list = self.json("/api/runs");
        let runs = list["runs"].as_array().expect("a list").clone();
        runs.into_iter().find(|it| it["id"] == id)
    }

    fn step(&self, id: &str) -> f64 {
        self.run(id)
            .map_or(-1.0, |it| it["step"].as_f64().unwrap_or(-1.0))
    }

    /// Resident memory in MiB, where the system tells.
    fn memory(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find(|it| it.starts_with("VmRSS:"))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? >> 10)
    }
}

impl Drop for Dash {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn line(step: u64) -> String {
    format!(
        "{{\"kind\":\"train\",\"step\":{step},\"bpb\":{},\"bytes_seen\":{},\"time\":{}}}\n",
        2.0 + 1.0 / step as f64,
        100 * step,
        1_700_000_000 + step
    )
}

/// A folder with a run of so many steps.
fn runs(steps: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    fs::create_dir(&run).expect("a folder");
    let text: String = (1..=steps).map(line).collect();
    fs::write(run.join("metrics.jsonl"), text).expect("metrics");
    fs::write(run.join("secret.txt"), "do not show").expect("a file");
    folder
}

fn append(folder: &Path, text: &str) {
    let path = folder.join("run/metrics.jsonl");
    let mut file = OpenOptions::new().append(true).open(path).expect("there");
    file.write_all(text.as_bytes()).expect("written");
}

#[test]
fn only_this_machines_own_pages_are_answered() {
    let folder = runs(5);
    let dash = Dash::start(folder.path());
    let port = dash.port;
    let status = |method: &str, headers: &str| dash.request(&format!("{method} /"), headers).0;
    for good in ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"] {
        assert_eq!(
            status("GET", &format!("Host: {good}:{port}\r\n")),
            200,
            "{good}"
        );
    }
    for bad in [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "0.0.0.0",
        "192.168.0.7",
    ] {
        assert_eq!(
            status("GET", &format!("Host: {bad}:{port}\r\n")),
            403,
            "{bad}"
        );
    }
    assert_eq!(status("GET", ""), 403, "no host");
    let own = format!("Host: localhost:{port}\r\n");
    for origin in ["http://evil.example", "null", "http://localhost:1"] {
        assert_eq!(
            status("GET", &format!("{own}Origin: {origin}\r\n")),
            403,
            "{origin}"
        );
    }
    assert_eq!(
        status("GET", &format!("{own}Origin: http://localhost:{port}\r\n")),
        200
    );
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        assert_eq!(status(method, &own), 405, "{method}");
    }
    let (_, answer) = dash.get("/");
    let answer = answer.to_lowercase();
    for header in [
        "content-security-policy: default-src 'none'",
        "x-frame-options: deny",
        "x-content-type-options: nosniff",
    ] {
        assert!(answer.contains(header), "{header}\n{answer}");
    }
    assert!(!answer.contains("access-control-allow"), "{answer}");
}

#[test]
fn no_request_becomes_a_path() {
    let folder = runs(5);
    let dash = Dash::start(folder.path());
    wait_until("the run is read", || dash.step("run") == 5.0);
    for name in [
        "../run",
        "run/../run",
        "..%2frun",
        "%2e%2e",
        "run%00",
        "/etc/passwd",
        "",
        "run/secret.txt",
        ".",
    ] {
        for address in ["run", "series", "samples", "inspections", "evaluations"] {
            let (status, _) = dash.get(&format!("/api/{address}?run={name}"));
            assert_eq!(status, 404, "{address} {name}");
        }
        let (status, _) = dash.get(&format!("/api/download?format=csv&run={name}"));
        assert_eq!(status, 404, "{name}");
    }
    for path in [
        "/assets/../api.rs",
        "/assets/..%2f..%2fapi.rs",
        "/assets/%2e%2e/%2e%2e/etc/passwd",
        "/assets//etc/passwd",
        "/run/secret.txt",
        "/assets/",
        "/../../etc/passwd",
    ] {
        let (status, answer) = dash.get(path);
        assert!([400, 404].contains(&status), "{path}: {answer}");
        assert!(
            !answer.contains("root:") && !answer.contains("do not show"),
            "{path}"
        );
    }
    // Bad numbers are answered, not panicked about.
    for query in [
        "points=0",
        "points=999999999",
        "from=NaN&to=inf",
        "from=9&to=1",
        "log_from=0&from=-5",
        "x=else",
    ] {
        let (status, _) = dash.get(&format!("/api/series?run=run&{query}"));
        assert!([200, 400].contains(&status), "{query}");
    }
}

#[test]
fn a_half_written_line_counts_when_it_is_whole_and_resumed_steps_count_once() {
    let folder = runs(10);
    let dash = Dash::start(folder.path());
    wait_until("the run is read", || dash.step("run") == 10.0);
    let next = line(11);
    append(folder.path(), &next[..20]);
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(dash.step("run"), 10.0);
    append(folder.path(), &next[20..]);
    wait_until("the line is whole", || dash.step("run") == 11.0);
    // Cut short by a crash, ended by the trainer that goes on.
    append(
        folder.path(),
        &format!("{}\n{{\"kind\":\"resume\",\"step\":8}}\n", &next[..20]),
    );
    append(folder.path(), &(9..=12).map(line).collect::<String>());
    wait_until("it goes on", || dash.step("run") == 12.0);
    let series = dash.json("/api/series?run=run");
    let steps: Vec<u64> = series["train"]["step"]
        .as_array()
        .expect("steps")
        .iter()
        .map(|it| it.as_f64().expect("a step") as u64)
        .collect();
    assert_eq!(steps, (1..=12).collect::<Vec<_>>());
    let about = dash.json("/api/run?run=run");
    assert_eq!(about["bad_lines"], 1);
    assert_eq!(about["marks"][0]["kind"], "resume");
}

#[test]
fn a_run_that_is_deleted_goes_and_a_new_one_comes() {
    let folder = runs(3);
    let dash = Dash::start(folder.path());
    wait_until("the run is read", || dash.step("run") == 3.0);
    fs::rename(folder.path().join("run"), folder.path().join("renamed")).expect("renamed");
    wait_until("the old name is gone", || dash.run("run").is_none());
    wait_until("the new one is there", || dash.step("renamed") == 3.0);
    assert_eq!(dash.get("/api/run?run=run").0, 404);
    // Another file in its place begins anew.
    fs::write(folder.path().join("renamed/metrics.jsonl"), line(1)).expect("written");
    wait_until("it is the new file's", || dash.step("renamed") == 1.0);
}

/// Ten gigabytes of which most is a hole: one endless line that is none.
#[test]
fn a_file_of_ten_gigabytes_is_read_in_little_memory() {
    let folder = runs(1000);
    let path = folder.path().join("run/metrics.jsonl");
    let file = OpenOptions::new().write(true).open(&path).expect("there");
    if file.set_len(10 << 30).is_err() {
        return common::skipped("a file of ten gigabytes", "no such files here");
    }
    drop(file);
    append(folder.path(), &format!("\n{}", line(1001)));
    let dash = Dash::start(folder.path());
    wait_until("the start is shown", || dash.step("run") == 1000.0);
    let asked = Instant::now();
    dash.json("/api/series?run=run");
    assert!(
        asked.elapsed() < Duration::from_secs(5),
        "answers meanwhile"
    );
    let mut most = 0;
    wait_until("the end is reached", || {
        most = most.max(dash.memory().unwrap_or(0));
        dash.step("run") == 1001.0
    });
    assert!(most < 200, "{most} MiB");
}

/// Lines of an event stream until one of them has `word`.
fn read_until(stream: &mut BufReader<TcpStream>, word: &str) {
    let mut line = String::new();
    loop {
        line.clear();
        let read = stream.read_line(&mut line).expect("it goes on");
        assert!(read > 0, "it ended before {word:?}");
        if line.contains(word) {
            return;
        }
    }
}

#[test]
fn fifty_pages_are_told_and_too_many_are_refused() {
    let folder = runs(3);
    let dash = Dash::start(folder.path());
    wait_until("the run is read", || dash.step("run") == 3.0);
    let open = || {
        let mut stream = dash.connect();
        write!(
            stream,
            "GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        .expect("sent");
        BufReader::new(stream)
    };
    let mut pages: Vec<_> = (0..50).map(|_| open()).collect();
    for page in &mut pages {
        read_until(page, "event: runs");
    }
    append(folder.path(), &line(4));
    for page in &mut pages {
        read_until(page, "event: rows");
        read_until(page, "\"step\":[4.0]");
    }
    let mut more: Vec<_> = (50..256).map(|_| open()).collect();
    for page in &mut more {
        read_until(page, "200 OK");
    }
    read_until(&mut open(), "503");
    drop(more);
    drop(pages);
    // Those that left make room.
    wait_until("there is room", || {
        append(folder.path(), "\n");
        append(folder.path(), &line(5));
        let mut page = open();
        let mut status = String::new();
        page.read_line(&mut status).expect("an answer");
        status.contains("200")
    });
}

#[test]
fn a_port_that_is_taken_and_a_missing_run_are_errors() {
    let workspace = Workspace::new();
    let folder = runs(1);
    let dash = Dash::start(folder.path());
    let line = format!("dash {} --port {}", folder.path().display(), dash.port);
    workspace.fails(&line, 2, &["cannot listen on port", "--port"]);
    for line in [
        "dash nowhere",
        "runs nowhere",
        "export-metrics nowhere --format csv",
    ] {
        workspace.fails(line, 4, &["`nowhere`: does not exist"]);
    }
}

const SETTINGS: [&str; 4] = [
    "train.validate_every=5",
    "train.validate_bytes=200",
    "train.sample_every=10",
    "train.sample_bytes=16",
];

#[test]
fn a_look_into_the_model_is_recorded_and_changes_nothing() {
    let workspace = Workspace::new();
    let with = [
        "train.inspect_every=5",
        "train.accumulation=2",
        "train.tensorboard=true",
    ];
    let without = ["train.inspect_every=0", "train.accumulation=2"];
    workspace.train("with", &with, "");
    workspace.train("without", &without, "");
    workspace.assert_same_runs("with", "without", 20);
    let looks: Vec<Value> = workspace
        .records("with")
        .into_iter()
        .filter(|it| it["kind"] == "inspect")
        .collect();
    assert_eq!(looks.len(), 4);
    for look in &looks {
        for key in ["delta_mean", "delta_max", "grad_norm", "weight_norm"] {
            let layers = look[key].as_array().expect("a list");
            assert_eq!(layers.len(), 2, "{key}");
            assert!(
                layers
                    .iter()
                    .all(|it| it.as_f64().is_some_and(|it| it > 0.0)),
                "{key}"
            );
        }
        // The layers' gradients are part of all gradients.
        let step = &look["step"];
        let records = workspace.records("with");
        let train = records
            .iter()
            .find(|it| it["kind"] == "train" && it["step"] == *step);
        let whole = train.expect("its step")["grad_norm"]
            .as_f64()
            .expect("a number");
        let squares: f64 = look["grad_norm"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|it| it.as_f64().unwrap_or(f64::NAN).powi(2))
            .sum();
        assert!(
            squares.sqrt() <= whole * 1.0001 && squares > 0.0,
            "{squares} {whole}"
        );
        assert!(look["groups"].as_array().is_some_and(|it| it.len() > 10));
    }
    assert!(
        !workspace
            .records("without")
            .iter()
            .any(|it| it["kind"] == "inspect")
    );
}

#[test]
fn runs_are_listed_and_exported() {
    let workspace = Workspace::new();
    workspace.train("run", &SETTINGS, "--stop-after 12");
    workspace.ok("resume run");
    let text = String::from_utf8(workspace.ok("runs")).expect("text");
    let row = text.lines().nth(1).expect("a run");
    for word in ["run", "finished", "20"] {
        assert!(row.contains(word), "{text}");
    }
    let list = workspace.json("runs --json");
    assert_eq!(
        (&list[0]["id"], &list[0]["state"]),
        (&"run".into(), &"finished".into())
    );
    let csv = String::from_utf8(workspace.ok("export-metrics run --format csv")).expect("text");
    let lines: Vec<&str> = csv.lines().collect();
    assert!(
        lines[0].starts_with("step,") && lines[0].contains("train.bpb"),
        "{csv}"
    );
    assert_eq!(lines.len(), 21, "{csv}");
    workspace.ok("export-metrics run --format tensorboard --out events");
    let files = fs::read_dir(workspace.path("events"))
        .expect("a folder")
        .count();
    assert_eq!(files, 1);
    workspace.fails(
        "export-metrics run --format csv --out events",
        2,
        &["exists already"],
    );
    File::open(workspace.run("run").join("metrics.jsonl")).expect("still there");
}
