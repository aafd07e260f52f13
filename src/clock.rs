//! The time of day, for records and locks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Time since 1970; nothing where the machine's clock stands before that.
pub(crate) fn since_1970() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}
