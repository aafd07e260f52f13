//! All runs, kept up to date by a thread of its own, and what pages are told of changes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::alarms::{Alarm, AlarmKind};
use super::run::Run;
use super::scan::{self, EvaluationFile, Found};
use super::tail::{Outcome, Tail};
use crate::clock::since_1970;

/// Between two looks at the files.
const TICK: Duration = Duration::from_millis(250);

/// Between two looks for new runs, configs and evaluations.
const SCAN: Duration = Duration::from_secs(2);

/// Between two tellings of the list of runs.
const LIST: Duration = Duration::from_secs(1);

/// Bytes of a file read while its run cannot be asked: some milliseconds.
const PIECE: u64 = 1 << 20;

/// Pieces of a run read before it is the next one's turn.
const PIECES: usize = 16;

/// Rows of all runs together, and of one at least. With 20 metrics a row takes about 100 bytes.
const ROWS: (usize, usize) = (3 << 20, 1 << 15);

/// Rows of one run at most.
const MOST_ROWS: usize = 3 << 19;

/// Messages kept for a page that is slow to read them.
const QUEUE: usize = 256;

/// A run without a known lock is taken to be at work for so many seconds after its last line, or for
/// so many usual distances between lines.
const FRESH: (f64, f64) = (30.0, 20.0);

/// The same where the lock is known not to be held: what is left is a trainer that it hides.
const FRESH_UNLOCKED: (f64, f64) = (3.0, 3.0);

/// One run.
pub(super) struct Shown {
    pub(super) id: String,
    folder: PathBuf,
    /// Configuration, flat.
    pub(super) config: BTreeMap<String, Value>,
    /// Name and content of evaluations.
    pub(super) evaluations: Vec<(String, Value)>,
    evaluation_files: Vec<EvaluationFile>,
    pub(super) run: Run,
    /// Bytes read, and bytes there are.
    progress: (u64, u64),
    /// Whether the file has been read to its end once.
    pub(super) complete: bool,
    locked: Option<bool>,
    modified: u64,
}

/// A run that several threads look at.
type Shared = Arc<RwLock<Shown>>;

/// All runs.
pub(super) struct Hub {
    runs: RwLock<BTreeMap<String, Shared>>,
    events: broadcast::Sender<Arc<str>>,
}

impl Hub {
    /// Starts the thread that reads the runs at and below `roots`.
    pub(super) fn start(roots: Vec<PathBuf>) -> std::io::Result<Arc<Self>> {
        let hub = Arc::new(Self {
            runs: RwLock::new(BTreeMap::new()),
            events: broadcast::channel(QUEUE).0,
        });
        let weak = Arc::downgrade(&hub);
        let mut reader = Reader::new(roots);
        thread::Builder::new()
            .name("dashboard".to_owned())
            .spawn(move || {
                while let Some(hub) = weak.upgrade() {
                    let busy = reader.turn(&hub);
                    drop(hub);
                    if !busy {
                        thread::sleep(TICK);
                    }
                }
            })?;
        Ok(hub)
    }

    /// What happens from now on.
    pub(super) fn subscribe(&self) -> broadcast::Receiver<Arc<str>> {
        self.events.subscribe()
    }

    /// The run that a request names.
    pub(super) fn get(&self, id: &str) -> Option<Shared> {
        read(&self.runs).get(id).cloned()
    }

    /// All runs in short.
    pub(super) fn list(&self) -> Value {
        let runs: Vec<Shared> = read(&self.runs).values().cloned().collect();
        let now = now();
        let list: Vec<Value> = runs.iter().map(|it| read(it).summary(now)).collect();
        let bytes: usize = runs.iter().map(|it| read(it).run.bytes()).sum();
        json!({ "now": now, "memory": bytes, "runs": list })
    }

    fn tell(&self, event: &str, data: &Value) {
        // Without a page nobody listens.
        let _ = self.events.send(format!("{event}\n{data}").into());
    }
}

impl Shown {
    /// Whether a trainer is at work, as far as can be told.
    fn at_work(&self, now: f64) -> bool {
        let Some(last) = self.run.train.last() else {
            return self.locked == Some(true);
        };
        let (least, distances) = match self.locked {
            Some(true) => return true,
            Some(false) => FRESH_UNLOCKED,
            None => FRESH,
        };
        let written = last.time.max(self.modified as f64);
        now - written < least.max(distances * self.run.watch.distance())
    }

    /// All alarms of the run. Silence is one only of a trainer that is known to be there.
    pub(super) fn alarms(&self, now: f64) -> Vec<Alarm> {
        self.run.alarms(self.locked == Some(true), now)
    }

    /// `train.steps`.
    fn total(&self) -> Option<f64> {
        self.config.get("train.steps").and_then(Value::as_f64)
    }

    fn state(&self, now: f64) -> &'static str {
        let step = self.run.train.last().map_or(0.0, |it| it.step);
        if self.total().is_some_and(|total| step >= total) {
            "finished"
        } else if self.at_work(now) {
            "running"
        } else {
            "stopped"
        }
    }

    /// What the list of runs says of this one.
    pub(super) fn summary(&self, now: f64) -> Value {
        let train = &self.run.train;
        let recent = |name: &str| {
            let rows = train.rows();
            let column = train.column(name)?;
            let sum = column.summary(rows.saturating_sub(20), rows);
            (sum.count > 0).then_some(sum.mean)
        };
        let last = train.last();
        let step = last.map_or(0.0, |it| it.step);
        let alarms = self.alarms(now);
        let newest_step = step;
        // What is long past is in the list of alarms, and no cause for alarm.
        let active: Vec<_> = alarms
            .iter()
            .filter(|it| newest_step - it.last_step <= 200.0 || it.kind == AlarmKind::Memory)
            .collect();
        json!({
            "id": self.id,
            "folder": self.folder.display().to_string(),
            "state": self.state(now),
            "step": step,
            "total": self.total(),
            "bytes": last.map(|it| it.bytes),
            "first_time": train.first().map(|it| it.time),
            "last_time": last.map(|it| it.time),
            "modified": self.modified,
            "bpb": recent("bpb"),
            "valid_bpb": self.run.valid.newest("bpb", 8),
            "word_perplexity": self.run.valid.newest("word_perplexity", 8),
            "bytes_per_second": recent("bytes_per_second"),
            "lr": train.newest("lr", 8),
            "grad_norm": recent("grad_norm"),
            "memory_gib": train.newest("memory_gib", 8),
            "seconds_left": self.seconds_left(),
            "alarms": active,
            "alarm_count": alarms.len(),
            "generation": self.run.generation,
            "indexed": match self.progress.1 {
                0 => 1.0,
                total => self.progress.0 as f64 / total as f64,
            },
        })
    }

    /// Seconds until the last step at the speed of the newest rows.
    fn seconds_left(&self) -> Option<f64> {
        let train = &self.run.train;
        let last = train.last()?;
        let from = train.place(train.rows().saturating_sub(200));
        let steps = last.step - from.step;
        let left = (self.total()? - last.step).max(0.0);
        (steps > 0.0).then(|| left * (last.time - from.time) / steps)
    }
}

/// What the reading thread holds.
struct Reader {
    roots: Vec<PathBuf>,
    tails: BTreeMap<String, (Found, Tail)>,
    scanned: Option<Instant>,
    listed: Option<Instant>,
    changed: bool,
}

impl Reader {
    fn new(roots: Vec<PathBuf>) -> Self {
        Self {
            roots,
            tails: BTreeMap::new(),
            scanned: None,
            listed: None,
            changed: true,
        }
    }

    /// Looks at everything once; whether there is more to read.
    fn turn(&mut self, hub: &Hub) -> bool {
        if self.scanned.is_none_or(|it| it.elapsed() >= SCAN) {
            self.scan(hub);
            self.scanned = Some(Instant::now());
        }
        let mut busy = false;
        let ids: Vec<String> = self.tails.keys().cloned().collect();
        for id in ids {
            if let (Some((_, tail)), Some(shared)) = (self.tails.get_mut(&id), hub.get(&id)) {
                busy |= follow(tail, &shared, hub, &mut self.changed);
            }
        }
        // A list without changes is told too, but less often: states depend on the clock.
        let wait = if self.changed { LIST } else { 5 * LIST };
        if self.listed.is_none_or(|it| it.elapsed() >= wait) {
            hub.tell("runs", &hub.list());
            self.listed = Some(Instant::now());
            self.changed = false;
        }
        busy
    }

    /// Finds runs that are new or gone, and what lies beside their metrics.
    fn scan(&mut self, hub: &Hub) {
        let found = scan::runs(&self.roots);
        let gone: Vec<String> = self
            .tails
            .iter()
            .filter(|(id, (known, _))| {
                !found
                    .iter()
                    .any(|it| it.id == **id && it.metrics == known.metrics)
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            self.tails.remove(&id);
            write(&hub.runs).remove(&id);
            self.changed = true;
        }
        let limit = (ROWS.0 / found.len().max(1)).clamp(ROWS.1, MOST_ROWS);
        for found in found {
            let folder = found.folder().to_owned();
            if !self.tails.contains_key(&found.id) {
                let shown = Shown::new(&found, limit);
                write(&hub.runs).insert(found.id.clone(), Arc::new(RwLock::new(shown)));
                let tail = Tail::new(&found.metrics);
                self.tails.insert(found.id.clone(), (found.clone(), tail));
                self.changed = true;
            }
            if let Some(shared) = hub.get(&found.id) {
                let config = scan::config(&folder);
                let files = scan::evaluation_files(&folder);
                let locked = scan::is_locked(&folder);
                let mut shown = write(&shared);
                if shown.evaluation_files != files {
                    shown.evaluations = scan::evaluations(&files);
                    shown.evaluation_files = files;
                    let news = json!({ "id": shown.id, "changed": ["evaluations"] });
                    hub.tell("rows", &news);
                }
                self.changed |= shown.locked != locked || shown.config != config;
                shown.config = config;
                shown.locked = locked;
                shown.modified = found.modified;
                shown.run.row_limit = limit;
                shown.run.train.limit(limit);
            }
        }
    }
}

impl Shown {
    fn new(found: &Found, row_limit: usize) -> Self {
        Self {
            id: found.id.clone(),
            folder: found.folder().to_owned(),
            config: BTreeMap::new(),
            evaluations: Vec::new(),
            evaluation_files: Vec::new(),
            run: Run::new(row_limit),
            progress: (0, 1),
            complete: false,
            locked: None,
            modified: found.modified,
        }
    }
}

/// Reads what is new of one run and tells the pages; whether there is more.
fn follow(tail: &mut Tail, shared: &Shared, hub: &Hub, changed: &mut bool) -> bool {
    let mut more = false;
    for _ in 0..PIECES {
        let mut shown = write(shared);
        let outcome = tail.read(PIECE, |line| shown.run.apply(line));
        more = false;
        match outcome {
            Ok(Outcome::More(_)) => more = true,
            Ok(Outcome::UpToDate(lines)) => {
                *changed |= lines > 0 || !shown.complete;
                shown.complete = true;
            }
            Ok(Outcome::Replaced) => {
                let generation = shown.run.generation + 1;
                shown.run = Run::new(shown.run.row_limit);
                shown.run.generation = generation;
                let news = json!({ "id": shown.id, "generation": generation, "all": true });
                hub.tell("rows", &news);
                more = true;
            }
            // The next scan finds that it is gone.
            Ok(Outcome::Gone) => {}
            Err(error) => tracing::debug!("{}: {error}", shown.folder.display()),
        }
        shown.progress = tail.progress();
        if !more {
            break;
        }
    }
    *changed |= more;
    let mut shown = write(shared);
    // While a file is read for the first time, or much of it at once, pages fetch what there is.
    let id = shown.id.clone();
    if let Some(news) = shown.run.news(&id) {
        hub.tell("rows", &news);
    }
    more
}

/// Seconds since 1970.
pub(super) fn now() -> f64 {
    since_1970().as_secs_f64()
}

/// A thread that panicked leaves what it held as it was: numbers for a screen.
pub(super) fn read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Everything that can be read of the runs at and below `roots`, once: for a table of them.
pub(super) fn read_all(roots: &[PathBuf]) -> Vec<Value> {
    let found = scan::runs(roots);
    let limit = (ROWS.0 / found.len().max(1)).clamp(ROWS.1, MOST_ROWS);
    let now = now();
    let mut list: Vec<(u64, Value)> = found
        .iter()
        .map(|found| (found.modified, summary_of(found, limit, now)))
        .collect();
    list.sort_by_key(|it| std::cmp::Reverse(it.0));
    list.into_iter().map(|it| it.1).collect()
}

fn summary_of(found: &Found, limit: usize, now: f64) -> Value {
    let mut shown = Shown::new(found, limit);
    let folder: &Path = found.folder();
    shown.config = scan::config(folder);
    shown.locked = scan::is_locked(folder);
    let mut tail = Tail::new(&found.metrics);
    while let Ok(Outcome::More(_)) = tail.read(u64::MAX >> 1, |line| shown.run.apply(line)) {}
    shown.progress = tail.progress();
    shown.summary(now)
}
