//! Ctrl-C and SIGTERM: the first asks the loop to save and stop, the second stops now.

use std::sync::atomic::{AtomicUsize, Ordering};

static SIGNALS: AtomicUsize = AtomicUsize::new(0);

/// Watches for signals from here on.
pub(super) fn watch() {
    // A second call (tests run several trainings in one process) leaves the first handler in place.
    let _ = ctrlc::set_handler(|| {
        if SIGNALS.fetch_add(1, Ordering::SeqCst) > 0 {
            std::process::exit(130);
        }
    });
}

/// Whether a signal has come.
pub(super) fn requested() -> bool {
    SIGNALS.load(Ordering::SeqCst) > 0
}
