//! SIGINT, SIGTERM and SIGHUP stop the current measurement; earlier results are still reported.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
};

use crate::Result;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The interval at which the signal flag is checked.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Installs the signal handlers.
pub(crate) fn watch() -> Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let context = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    drop(context);
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        INTERRUPTED.store(true, Ordering::Relaxed);
    });
    Ok(())
}

/// Returns an error after a signal.
pub(crate) fn check() -> Result<()> {
    match INTERRUPTED.load(Ordering::Relaxed) {
        true => Err("interrupted".into()),
        false => Ok(()),
    }
}

/// Sleeps until the deadline or a signal.
pub(crate) fn sleep_until(end: Instant) -> Result<()> {
    while Instant::now() < end {
        check()?;
        thread::sleep(POLL_INTERVAL.min(end.saturating_duration_since(Instant::now())));
    }
    Ok(())
}
