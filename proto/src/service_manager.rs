//! systemd, where it has started a program: it is told when the program is ready, that it lives, and that it ends
//! (`sd_notify(3)`). Where nobody listens, nothing is said.

use std::time::Duration;

use sd_notify::NotifyState;

/// Ready, with a line for `systemctl status`.
pub fn ready(status: &str) {
    let _ = sd_notify::notify(&[NotifyState::Status(status), NotifyState::Ready]);
}

/// The end has begun.
pub fn stopping() {
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
}

/// How often a sign of life is wanted, where one is (`WatchdogSec=`): twice as often as systemd's patience.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|patience| patience / 2)
}

/// A sign of life.
pub fn alive() {
    let _ = sd_notify::notify(&[NotifyState::Watchdog]);
}
