//! Signs of life for systemd's watchdog.

use tunefleet_proto::service_manager;

/// Gives them, as long as this runtime gets round to it; never ends.
pub(crate) async fn live() {
    let Some(interval) = service_manager::watchdog_interval() else { return std::future::pending().await };
    loop {
        service_manager::alive();
        tokio::time::sleep(interval).await;
    }
}
