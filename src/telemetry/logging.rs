//! The log: to stderr, one line a record, `key=value`. Under systemd's journal a line begins with
//! its priority (`sd-daemon(3)`) and leaves the time to the journal.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use log::{Level, warn};

/// The target of the access line.
pub const ACCESS: &str = "access";
/// What one field may take of a line.
const MAX_FIELD: usize = 256;

/// Whether stderr is the journal: systemd names its device and inode, and a child may inherit the
/// variable with another stderr.
static IS_JOURNAL: LazyLock<bool> = LazyLock::new(|| {
    let stderr = io::stderr().as_fd().try_clone_to_owned().map(File::from);
    let stderr = stderr.and_then(|file| file.metadata());
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    stderr.is_ok_and(|meta| named == format!("{}:{}", meta.dev(), meta.ino()))
});

/// Starts the logger with a filter of env_logger's syntax.
pub fn init(filter: &str) {
    env_logger::Builder::new()
        .parse_filters(filter)
        .format(|out, record| {
            // At DEBUG tokio-postgres writes out the parameters of statements: titles, hashes.
            if record.level() > Level::Info && record.target().starts_with("tokio_postgres") {
                return Ok(());
            }
            write_line(out, record.level(), &record.args().to_string())
        })
        .init();
}

fn write_line(out: &mut impl io::Write, level: Level, message: &str) -> io::Result<()> {
    let message = strip_control(message);
    if *IS_JOURNAL {
        let priority = match level {
            Level::Error => 3,
            Level::Warn => 4,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        };
        return writeln!(out, "<{priority}>{message}");
    }
    const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(3));
    let now = PRINTER.timestamp_to_string(&Timestamp::now());
    writeln!(out, "{now} {level:<5} {message}")
}

/// Writes the error that ends the process, whatever the filter.
pub fn print_fatal(error: &str) {
    let mut stderr = io::stderr();
    // If stderr cannot be written to, the exit code has to do.
    let _ = match *IS_JOURNAL {
        true => write_line(&mut stderr, Level::Error, error),
        false => writeln!(stderr, "todo-api: {}", strip_control(error)),
    };
}

/// Makes every panic one line, whatever the filter.
pub fn set_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        if CATCHING.get() {
            PANIC_LOCATION.set(place);
        } else {
            let line = format!("panic: {}", logfmt_value(&panic.to_string()));
            let _ = write_line(&mut io::stderr(), Level::Error, &line);
        }
    }));
}

thread_local! {
    /// Whether somebody will report a panic of this thread.
    static CATCHING: Cell<bool> = const { Cell::new(false) };
    /// Where it was.
    static PANIC_LOCATION: Cell<Option<String>> = const { Cell::new(None) };
}

/// Runs something that may panic; a panic is one line, the caller's, who is given its text.
pub(crate) fn catch_panic<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    CATCHING.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    CATCHING.set(false);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let place = PANIC_LOCATION.take().map(|place| format!(" at {place}"));
        format!(
            "panic: {}{}",
            text.unwrap_or_default(),
            place.unwrap_or_default()
        )
    })
}

/// A value for a log line: as it is where it is plain, else quoted and escaped, so that nobody can
/// forge a field or a line; cut where it is long.
pub(crate) fn logfmt_value(value: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._~:/@%+,!$&'()*;-".contains(c);
    if !value.is_empty() && value.len() <= MAX_FIELD && value.chars().all(plain) {
        return Cow::Borrowed(value);
    }
    let mut quoted = String::from("\"");
    for c in value.chars().take(MAX_FIELD) {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            ' '..='~' => quoted.push(c),
            // Whatever is not printable ASCII, so no line separator of anybody's.
            other => {
                // Writing to a string does not fail.
                write!(quoted, "\\u{{{:x}}}", u32::from(other)).ok();
            }
        }
    }
    if value.chars().nth(MAX_FIELD).is_some() {
        quoted.push('…');
    }
    quoted.push('"');
    Cow::Owned(quoted)
}

/// The last gate: a record is one line even where its text came from elsewhere.
fn strip_control(text: &str) -> Cow<'_, str> {
    if !text.contains(|c: char| c.is_control()) {
        return Cow::Borrowed(text);
    }
    let escaped = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    Cow::Owned(escaped.collect())
}

/// Lines about refused requests: one a second, which says how many it stands for. A database that
/// is away must not fill the disk with news of it.
#[derive(Default)]
pub(crate) struct ThrottledLog {
    last: Mutex<(Option<Instant>, u64)>,
}

impl ThrottledLog {
    /// Logs what `line` makes of how many went unsaid, unless a line was just written.
    pub(crate) fn warn(&self, line: impl FnOnce(&str) -> String) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last
            .0
            .is_some_and(|at| at.elapsed() < Duration::from_secs(1))
        {
            last.1 += 1;
            return;
        }
        let suppressed = std::mem::take(&mut last.1);
        last.0 = Some(Instant::now());
        drop(last);
        let more = if suppressed > 0 {
            format!(" suppressed={suppressed}")
        } else {
            String::new()
        };
        warn!("{}", line(&more));
    }
}

#[cfg(test)]
mod tests {
    use super::logfmt_value;

    #[test]
    fn no_value_can_forge_a_field_or_a_line() {
        assert_eq!(logfmt_value("/api/v1/auth/me"), "/api/v1/auth/me");
        assert_eq!(logfmt_value("a client=1.2.3.4"), "\"a client=1.2.3.4\"");
        assert_eq!(logfmt_value("a\" reason=\"b"), "\"a\\\" reason=\\\"b\"");
        assert_eq!(
            logfmt_value("a\r\nb\u{2028}c"),
            "\"a\\u{d}\\u{a}b\\u{2028}c\""
        );
        assert_eq!(logfmt_value(""), "\"\"");
        assert!(logfmt_value(&"x".repeat(10_000)).len() < 300);
    }
}
