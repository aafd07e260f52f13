//! How long each kernel runs on the device.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use cubecl::logging::{LaunchObservation, LaunchObserver, TimingRequest};
use cubecl::profile::TimingMethod;

#[derive(Default)]
struct Times(Mutex<Vec<(&'static str, Duration)>>);

impl LaunchObserver for Times {
    fn launched(&self, _kernel: &'static str) {}

    fn timing(&self) -> TimingRequest {
        TimingRequest::Resolved
    }

    fn timed(&self, kernel: &'static str, duration: Duration, _method: TimingMethod) {
        if let Ok(mut times) = self.0.lock() {
            times.push((kernel, duration));
        }
    }
}

/// Every kernel that `work` launches, in order, and how long it ran; each waits for the one before.
pub fn kernel_times(work: impl FnOnce()) -> Vec<(String, Duration)> {
    let times = Arc::new(Times::default());
    let observation = LaunchObservation::new(times.clone());
    work();
    drop(observation);
    let Ok(times) = times.0.lock() else {
        return Vec::new();
    };
    // The last part of a path, without generic arguments.
    let short = |name: &str| -> String {
        let name = name.split('<').next().unwrap_or(name);
        name.rsplit("::").next().unwrap_or(name).to_owned()
    };
    times
        .iter()
        .map(|(name, time)| (short(name), *time))
        .collect()
}
