//! `todo-api`: reads the arguments and hands over to the command.

use std::process::ExitCode;

use lexopt::Arg::{Long, Short, Value};
use todo_api::cli::{self, Command};
use todo_api::embedded_postgres;
use todo_api::telemetry::logging;

fn main() -> ExitCode {
    logging::set_panic_hook();
    if let Err(error) = embedded_postgres::become_child() {
        logging::print_fatal(&format!("cannot run PostgreSQL: {error}"));
        return ExitCode::FAILURE;
    }
    let command = match parse_args() {
        Ok(command) => command,
        Err(error) => {
            logging::print_fatal(&format!("{error}; see todo-api --help"));
            return ExitCode::from(2);
        }
    };
    cli::run(command).unwrap_or_else(|error| {
        logging::print_fatal(&error.to_string());
        ExitCode::FAILURE
    })
}

fn parse_args() -> Result<Command, lexopt::Error> {
    let mut parser = lexopt::Parser::from_env();
    let mut positionals = Vec::new();
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            Value(word) => positionals.push(word.into_string()?),
            other => return Err(other.unexpected()),
        }
    }
    let positionals: Vec<&str> = positionals.iter().map(String::as_str).collect();
    match positionals.as_slice() {
        [] | ["serve"] => Ok(Command::Serve),
        ["migrate"] => Ok(Command::Migrate),
        ["check"] => Ok(Command::Check),
        ["set-password", email] => Ok(Command::SetPassword((*email).to_owned())),
        ["set-password"] => Err("set-password takes an e-mail address".into()),
        _ => Err(format!("there is no command “{}”", positionals.join(" ")).into()),
    }
}
