//! The medians and the tables.

use std::{
    fmt::Display,
    fs,
    path::{Path, PathBuf},
    thread,
};

use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    CONNECTIONS, Error, IDLE_CONNECTIONS, LOGIN_CLIENTS, Options, Result, client::Load, work::Work,
};

pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

/// Returns the median of each figure over the rounds.
fn medians(rounds: &[&Value]) -> Value {
    let figures = rounds[0].as_object().into_iter().flatten();
    let medians = figures.map(|(name, first)| {
        let values = rounds.iter().map(|round| &round[name]);
        let median = match first {
            Value::Object(_) => medians(&values.collect::<Vec<_>>()),
            _ => json!(median(
                &values.filter_map(Value::as_f64).collect::<Vec<_>>()
            )),
        };
        (name.clone(), median)
    });
    Value::Object(medians.collect())
}

fn machine() -> Value {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({
        "cores": thread::available_parallelism().map_or(0, usize::from),
        "cpu": model.map(|(_, model)| model),
        "kernel": kernel.trim(),
    })
}

/// The results of one kind of work in one round.
#[derive(Default)]
pub(crate) struct Round {
    pub(crate) service: Option<Load>,
    pub(crate) pgbench: Option<Pgbench>,
    pub(crate) other: Option<Load>,
}

pub(crate) struct Pgbench {
    /// Transactions per second.
    pub(crate) rate: f64,
    /// PostgreSQL's CPU time per transaction, in microseconds.
    pub(crate) postgres_us: Option<f64>,
}

impl Round {
    fn is_empty(&self) -> bool {
        self.service.is_none() && self.pgbench.is_none() && self.other.is_none()
    }

    fn figures(&self, load: Option<&Load>) -> Value {
        let (rate, pgbench) = (load.map(Load::rate), self.pgbench.as_ref());
        json!({
            "ratio": rate.zip(pgbench).map(|(rate, pgbench)| rate / pgbench.rate),
            "requests_per_second": rate,
            "pgbench_per_second": pgbench.map(|pgbench| pgbench.rate),
            "p50_ms": load.map(|load| load.percentile(50)),
            "p95_ms": load.map(|load| load.percentile(95)),
            "p99_ms": load.map(|load| load.percentile(99)),
            "server_us": load.and_then(|load| load.cost(load.cpu.server)),
            "postgres_us": load.and_then(|load| load.cost(load.cpu.postgres)),
            "pgbench_postgres_us": pgbench.and_then(|pgbench| pgbench.postgres_us),
            "client_us": load.and_then(|load| load.cost(load.cpu.client)),
            "failed": load.map(|load| load.failed),
        })
    }
}

/// All results, which are also written to a file after each measurement.
pub(crate) struct Report {
    figures: Value,
    path: PathBuf,
}

impl Report {
    pub(crate) fn new(options: &Options, postgresql: Option<&str>) -> Self {
        let work = options.work();
        let work = work
            .iter()
            .map(|work| json!({"work": work.name(), "rounds": []}));
        Self {
            figures: json!({
                "machine": machine(),
                "postgresql": postgresql,
                "seconds": options.seconds.as_secs(),
                "rounds": options.rounds,
                "complete": false,
                "work": work.collect::<Vec<_>>(),
            }),
            path: Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("throughput.json"),
        }
    }

    pub(crate) fn record_round(&mut self, work: Work, round: &Round) -> Result<()> {
        if round.is_empty() {
            return Ok(());
        }
        let mut row = round.figures(round.service.as_ref());
        if let Some(other) = &round.other {
            let service = round.service.as_ref();
            row["to_other"] = json!(service.map(|service| service.rate() / other.rate()));
            row["other"] = round.figures(Some(other));
        }
        print_figure(
            work.name(),
            format_args!(
                "{}/s, pgbench {}/s, ratio {}, p95 {} ms",
                show(&row["requests_per_second"], 0),
                show(&row["pgbench_per_second"], 0),
                show(&row["ratio"], 2),
                show(&row["p95_ms"], 2)
            ),
        );
        let all = self.figures["work"].as_array_mut().into_iter().flatten();
        for one in all.filter(|one| one["work"] == work.name()) {
            if let Some(rounds) = one["rounds"].as_array_mut() {
                rounds.push(row.clone());
                one["median"] = medians(&rounds.iter().collect::<Vec<_>>());
            }
        }
        self.write()
    }

    /// Records a figure outside the rounds; dots in the name separate nested objects.
    pub(crate) fn record(&mut self, name: &str, figure: impl Serialize) -> Result<()> {
        let figure = serde_json::to_value(figure)?;
        print_figure(name, &figure);
        let entry = name
            .split('.')
            .fold(&mut self.figures["scenarios"], |object, name| {
                &mut object[name]
            });
        *entry = figure;
        self.write()
    }

    /// Prints the tables, even of an incomplete run.
    pub(crate) fn finish(&mut self, error: Option<&Error>) -> Result<()> {
        match error {
            None => self.figures["complete"] = true.into(),
            Some(error) => println!("\nIncomplete: {error}"),
        }
        self.write()?;
        print_report(&self.figures);
        println!("\nAll figures: {}", self.path.display());
        Ok(())
    }

    fn write(&self) -> Result<()> {
        let unfinished = self.path.with_extension("json.unfinished");
        fs::write(&unfinished, serde_json::to_string_pretty(&self.figures)?)?;
        Ok(fs::rename(&unfinished, &self.path)?)
    }
}

/// Prints a line in place of the progress line.
fn print_figure(name: &str, figure: impl Display) {
    eprint!("\r\x1b[K");
    println!("{name}: {figure}");
}

fn print_report(report: &Value) {
    let machine = &report["machine"];
    println!(
        "\n{} cores, {}, Linux {}; PostgreSQL {}; medians of {} rounds of {} s; {CONNECTIONS} connections\n",
        machine["cores"],
        machine["cpu"].as_str().unwrap_or("CPU unknown"),
        machine["kernel"].as_str().unwrap_or("–"),
        report["postgresql"].as_str().unwrap_or("–"),
        report["rounds"],
        report["seconds"],
    );
    print_work(&report["work"]);
    if report["scenarios"].is_object() {
        print_scenarios(&report["scenarios"]);
    }
}

/// Formats a figure, or a dash if there is none.
fn show(value: &Value, decimals: usize) -> String {
    match value.as_f64() {
        Some(number) => format!("{number:.decimals$}"),
        None => "–".to_owned(),
    }
}

fn print_work(work: &Value) {
    let columns = [
        ("to_other", "to other", 2),
        ("ratio", "ratio", 2),
        ("requests_per_second", "req/s", 0),
        ("pgbench_per_second", "pgbench/s", 0),
        ("p50_ms", "p50 ms", 2),
        ("p95_ms", "p95 ms", 2),
        ("p99_ms", "p99 ms", 2),
        ("server_us", "server µs", 0),
        ("postgres_us", "postgres µs", 0),
        ("pgbench_postgres_us", "PostgreSQL CPU with pgbench", 0),
        ("client_us", "client µs", 0),
        ("failed", "failed", 0),
    ];
    let rows: Vec<&Value> = work.as_array().into_iter().flatten().collect();
    let alone = rows.iter().all(|row| row["median"]["other"].is_null());
    let columns = &columns[usize::from(alone)..];
    print!("| {:<10} |", "work");
    for (_, title, _) in columns {
        print!(" {title:>6} |");
    }
    println!("\n|---|{}", "---:|".repeat(columns.len()));
    for row in rows {
        let name = row["work"].as_str().unwrap_or_default();
        let median = &row["median"];
        for (name, figures) in [(name, median), ("  other", &median["other"])] {
            if !figures.is_object() {
                continue;
            }
            print!("| {name:<10} |");
            for (figure, title, decimals) in columns {
                let width = title.chars().count().max(6);
                print!(" {:>width$} |", show(&figures[*figure], *decimals));
            }
            println!();
        }
    }
}

fn print_scenarios(report: &Value) {
    let constant = &report["constant_response"];
    println!(
        "\nConstant response: {}/s, {} µs of CPU time each in that server, {} in the client.",
        show(&constant["requests_per_second"], 0),
        show(&constant["server_us"], 0),
        show(&constant["client_us"], 0),
    );
    let logins = &report["logins"];
    println!(
        "{LOGIN_CLIENTS} clients logging in: {}/s alone, {} of bare bcrypt's {}/s on {} threads; {}/s during reads.",
        show(&logins["alone_per_second"], 1),
        show(&logins["alone_to_bare_bcrypt"], 2),
        show(&logins["bare_bcrypt_per_second"], 1),
        show(&logins["hashing_threads"], 0),
        show(&logins["beside_reads_per_second"], 1),
    );
    println!(
        "Reads meanwhile: {}/s, {} of the usual rate; p95 {} ms, p99 {} ms (usually {} and {}).",
        show(&logins["reads_beside"]["requests_per_second"], 0),
        show(&logins["reads_beside_to_quiet"], 2),
        show(&logins["reads_beside"]["p95_ms"], 1),
        show(&logins["reads_beside"]["p99_ms"], 1),
        show(&logins["reads_quiet"]["p95_ms"], 1),
        show(&logins["reads_quiet"]["p99_ms"], 1),
    );
    let memory = &report["memory_mib"];
    println!(
        "Resident memory: {} MiB idle, {} after the load, {} with {IDLE_CONNECTIONS} idle connections. Start to the first response: {} ms.\n",
        show(&memory["idle"], 1),
        show(&memory["after_the_load"], 1),
        show(&memory["idle_connections_2000"], 1),
        show(&report["start_up_ms"], 0),
    );
    println!(
        "| growth | read one/s | list 20/s | 20 from the middle/s | failed |\n|---|---:|---:|---:|---:|"
    );
    for (what, row) in report["growth"].as_object().into_iter().flatten() {
        println!(
            "| {} | {} | {} | {} | {} |",
            what,
            show(&row["read_per_second"], 0),
            show(&row["list_per_second"], 0),
            show(&row["middle_page_per_second"], 0),
            show(&row["failed"], 0),
        );
    }
}
