//! The log: one line per record on stderr. In systemd's journal a line starts with its priority
//! (`sd-daemon(3)`) instead of the time and the level.

use std::borrow::Cow;
use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;

use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use log::{Level, LevelFilter, Metadata};

/// The target of the access log.
pub(crate) const ACCESS: &str = "access";
/// The longest value of a field, in characters.
const MAX_FIELD: usize = 256;

/// Whether stderr is the journal. `JOURNAL_STREAM` alone is not enough: a child process inherits it
/// even if its stderr is redirected.
static IS_JOURNAL: LazyLock<bool> = LazyLock::new(|| {
    let stderr = io::stderr().as_fd().try_clone_to_owned().map(File::from);
    let stderr = stderr.and_then(|file| file.metadata());
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    stderr.is_ok_and(|meta| named == format!("{}:{}", meta.dev(), meta.ino()))
});

/// Checks a filter in `RUST_LOG` syntax. env_logger would take a misspelled level for a target, and
/// turn off everything else, including the errors of the service.
pub(crate) fn check_filter(filter: &str) -> Result<(), String> {
    let mut parsed = env_filter::Builder::new();
    parsed
        .try_parse(filter)
        .map_err(|error| error.to_string())?;
    let directives = filter.split('/').next().unwrap_or_default().split(',');
    for directive in directives.map(str::trim).filter(|text| !text.is_empty()) {
        if !directive.contains('=') && directive.parse::<LevelFilter>().is_err() {
            return Err(format!(
                "“{directive}” is not a level (off, error, warn, info, debug or trace)"
            ));
        }
    }
    let errors = Metadata::builder()
        .level(Level::Error)
        .target("todo_api")
        .build();
    if !parsed.build().enabled(&errors) && !filter.trim().eq_ignore_ascii_case("off") {
        return Err("it hides the errors of todo-api".into());
    }
    Ok(())
}

/// Initializes the logger with a filter in `RUST_LOG` syntax.
pub(crate) fn init(filter: &str) {
    env_logger::Builder::new()
        .parse_filters(filter)
        .format(|out, record| {
            // At DEBUG tokio-postgres logs the parameters of statements: titles and hashes.
            if record.level() > Level::Info && record.target().starts_with("tokio_postgres") {
                return Ok(());
            }
            write_line(out, record.level(), &record.args().to_string())
        })
        .init();
}

fn write_line(out: &mut impl io::Write, level: Level, message: &str) -> io::Result<()> {
    // The text of a dependency's error may contain line breaks.
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

/// Writes the error that ends the process, regardless of the filter.
pub(crate) fn print_fatal(error: &str) {
    let mut stderr = io::stderr();
    // If stderr cannot be written to, only the exit code reports the error.
    let _ = match *IS_JOURNAL {
        true => write_line(&mut stderr, Level::Error, error),
        false => writeln!(stderr, "todo-api: {}", strip_control(error)),
    };
}

/// Logs each panic in one line, regardless of the filter.
pub(crate) fn set_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        if CATCHING.get() {
            PANIC_LOCATION.set(panic.location().map(ToString::to_string));
        } else {
            let line = format!("panic: {}", logfmt_value(&panic.to_string()));
            let _ = write_line(&mut io::stderr(), Level::Error, &line);
        }
    }));
}

thread_local! {
    /// Whether this thread is in `catch_panic`, whose caller logs the panic.
    static CATCHING: Cell<bool> = const { Cell::new(false) };
    static PANIC_LOCATION: Cell<Option<String>> = const { Cell::new(None) };
}

/// Calls `f` and returns the message and the location of a panic as the error, without logging it.
pub(crate) fn catch_panic<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    CATCHING.set(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    CATCHING.set(false);
    result.map_err(|panic| {
        let message = match panic.downcast::<String>() {
            Ok(message) => *message,
            Err(panic) => panic
                .downcast_ref::<&str>()
                .copied()
                .unwrap_or_default()
                .into(),
        };
        let location = PANIC_LOCATION
            .take()
            .map(|location| format!(" at {location}"));
        format!("panic: {message}{}", location.unwrap_or_default())
    })
}

/// Formats a value of a `key=value` field: quoted, escaped and truncated where necessary, so that no
/// input can forge a field or a line.
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
            // Includes Unicode's line separators.
            _ => quoted.extend(c.escape_unicode()),
        }
    }
    if value.chars().nth(MAX_FIELD).is_some() {
        quoted.push('…');
    }
    quoted.push('"');
    Cow::Owned(quoted)
}

fn strip_control(text: &str) -> Cow<'_, str> {
    match text.contains(char::is_control) {
        true => Cow::Owned(text.replace(char::is_control, " ")),
        false => Cow::Borrowed(text),
    }
}
