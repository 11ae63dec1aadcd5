//! The `todo-api` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    todo_api::cli::run()
}
