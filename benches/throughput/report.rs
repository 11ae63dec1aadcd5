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
    CONNECTIONS, Error, IDLE_CONNECTIONS, LOGIN_CLIENTS, Result, client::Load, options::Options,
    work::Work,
};

pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

fn lowest(values: &[f64]) -> Option<f64> {
    values.iter().copied().min_by(f64::total_cmp)
}

fn highest(values: &[f64]) -> Option<f64> {
    values.iter().copied().max_by(f64::total_cmp)
}

/// Returns a statistic of each figure over the rounds.
fn summarize(rounds: &[&Value], statistic: fn(&[f64]) -> Option<f64>) -> Value {
    let figures = rounds[0].as_object().into_iter().flatten();
    let summaries = figures.map(|(name, first)| {
        let values = rounds.iter().map(|round| &round[name]);
        let summary = match first {
            Value::Object(_) => summarize(&values.collect::<Vec<_>>(), statistic),
            _ => json!(statistic(
                &values.filter_map(Value::as_f64).collect::<Vec<_>>()
            )),
        };
        (name.clone(), summary)
    });
    Value::Object(summaries.collect())
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
        Self {
            figures: json!({
                "machine": machine(),
                "postgresql": postgresql,
                "seconds": options.seconds.as_secs(),
                "rounds": options.rounds,
                "complete": false,
                "other": options.peers.as_ref().or(options.against.as_ref()),
                "work": [],
            }),
            path: Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("throughput.json"),
        }
    }

    pub(crate) fn record_round(&mut self, work: &str, round: &Round) -> Result<()> {
        if round.is_empty() {
            return Ok(());
        }
        let mut row = round.figures(round.service.as_ref());
        let mut line = format!("{}/s", show(&row["requests_per_second"], 0));
        if round.pgbench.is_some() {
            let (pgbench, ratio) = (&row["pgbench_per_second"], &row["ratio"]);
            line += &format!(", pgbench {}/s, ratio {}", show(pgbench, 0), show(ratio, 2));
        }
        if let Some(other) = &round.other {
            let service = round.service.as_ref();
            row["to_other"] = json!(service.map(|service| service.rate() / other.rate()));
            row["other"] = round.figures(Some(other));
            let (other, ratio) = (&row["other"]["requests_per_second"], &row["to_other"]);
            line += &format!(", other {}/s, ratio {}", show(other, 0), show(ratio, 2));
        }
        let p95 = show(&row["p95_ms"], 2);
        print_figure(work, format_args!("{line}, p95 {p95} ms"));
        let Some(all) = self.figures["work"].as_array_mut() else {
            return Err("the rows are not an array".into());
        };
        if !all.iter().any(|one| one["work"] == work) {
            all.push(json!({"work": work, "rounds": []}));
        }
        for one in all.iter_mut().filter(|one| one["work"] == work) {
            if let Some(rounds) = one["rounds"].as_array_mut() {
                rounds.push(row.clone());
                let rounds = rounds.clone();
                let rounds: Vec<&Value> = rounds.iter().collect();
                one["median"] = summarize(&rounds, median);
                one["lowest"] = summarize(&rounds, lowest);
                one["highest"] = summarize(&rounds, highest);
            }
        }
        self.write()
    }

    /// Returns a statistic of the ratio of this row to pgbench; zero if there is none.
    pub(crate) fn ratio(&self, work: &str, statistic: &str) -> f64 {
        let mut rows = self.figures["work"].as_array().into_iter().flatten();
        let row = rows.find(|row| row["work"] == work);
        row.and_then(|row| row[statistic]["ratio"].as_f64())
            .unwrap_or(0.0)
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
    if report["other"].is_string() {
        println!("The other program: {}\n", report["other"]);
    }
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
        ("median", "to_other", "to other", 2),
        ("lowest", "to_other", "lowest", 2),
        ("highest", "to_other", "highest", 2),
        ("median", "ratio", "ratio", 2),
        ("lowest", "ratio", "lowest", 2),
        ("highest", "ratio", "highest", 2),
        ("median", "requests_per_second", "req/s", 0),
        ("median", "pgbench_per_second", "pgbench/s", 0),
        ("median", "p50_ms", "p50 ms", 2),
        ("median", "p95_ms", "p95 ms", 2),
        ("median", "p99_ms", "p99 ms", 2),
        ("median", "server_us", "server µs", 0),
        ("median", "postgres_us", "postgres µs", 0),
        (
            "median",
            "pgbench_postgres_us",
            "PostgreSQL CPU with pgbench",
            0,
        ),
        ("median", "client_us", "client µs", 0),
        ("median", "failed", "failed", 0),
    ];
    let rows: Vec<&Value> = work.as_array().into_iter().flatten().collect();
    // Without pgbench or another program, its columns are empty.
    let is_used = |(statistic, figure, ..): &(&str, &str, &str, usize)| {
        rows.iter().any(|row| !row[statistic][figure].is_null())
    };
    let columns: Vec<_> = columns.into_iter().filter(is_used).collect();
    let names = rows.iter().filter_map(|row| row["work"].as_str());
    let first = names.map(|name| name.chars().count()).max().unwrap_or(0);
    print!("| {:<first$} |", "work");
    for (_, _, title, _) in &columns {
        print!(" {title:>7} |");
    }
    println!("\n|---|{}", "---:|".repeat(columns.len()));
    for row in rows {
        let name = row["work"].as_str().unwrap_or_default();
        let is_compared = row["median"]["other"].is_object();
        for is_other in [false, true] {
            if is_other && !is_compared {
                continue;
            }
            print!("| {:<first$} |", if is_other { "  other" } else { name });
            for (statistic, figure, title, decimals) in &columns {
                let figures = match is_other {
                    true => &row[statistic]["other"],
                    false => &row[statistic],
                };
                let width = title.chars().count().max(7);
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
        "{LOGIN_CLIENTS} clients logging in: {}/s alone, {} of bare bcrypt's {}/s on {} threads.",
        show(&logins["alone_per_second"], 1),
        show(&logins["alone_to_bare_bcrypt"], 2),
        show(&logins["bare_bcrypt_per_second"], 1),
        show(&logins["bare_bcrypt_threads"], 0),
    );
    for work in [Work::Read, Work::List] {
        let row = &logins[work.name()];
        println!(
            "{} meanwhile: {}/s, {} of the usual rate; p95 {} ms, p99 {} ms (usually {} and {}); {} logins/s.",
            work.name(),
            show(&row["beside"]["requests_per_second"], 0),
            show(&row["to_quiet"], 2),
            show(&row["beside"]["p95_ms"], 1),
            show(&row["beside"]["p99_ms"], 1),
            show(&row["quiet"]["p95_ms"], 1),
            show(&row["quiet"]["p99_ms"], 1),
            show(&row["logins_per_second"], 1),
        );
    }
    let memory = &report["memory_mib"];
    println!(
        "Resident memory: {} MiB idle, {} after the load, {} with {IDLE_CONNECTIONS} idle connections. Start to the first response: {} ms.\n",
        show(&memory["idle"], 1),
        show(&memory["after_the_load"], 1),
        show(&memory["idle_connections_2000"], 1),
        show(&report["start_up_ms"], 0),
    );
    println!(
        "| growth | read one/s | list 20/s | 20 from the middle/s | 20 changes/s | failed |\n|---|---:|---:|---:|---:|---:|"
    );
    for (what, row) in report["growth"].as_object().into_iter().flatten() {
        println!(
            "| {} | {} | {} | {} | {} | {} |",
            what,
            show(&row["read_per_second"], 0),
            show(&row["list_per_second"], 0),
            show(&row["middle_page_per_second"], 0),
            show(&row["changes_per_second"], 0),
            show(&row["failed"], 0),
        );
    }
}
