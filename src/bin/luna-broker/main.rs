//! The `luna-broker` binary: arguments to settings, settings to a broker or a client, the outcome to an exit code.

use std::process::ExitCode;

use clap::Parser;

mod args;
mod bench;
mod comfyui_paths;
mod control;
mod doctor;
mod exit;
mod folders;
mod serve;
mod show;

use args::{Args, Command};

fn main() -> ExitCode {
    let args = Args::parse();
    args.start_logging();
    let outcome = match args.command {
        Command::Serve(serve) => serve::run(&args.connection, &serve),
        Command::Status { metrics: true, .. } => control::metrics(&args.connection),
        Command::Status { json, .. } => control::status(&args.connection, json),
        Command::Models { json } => control::models(&args.connection, json),
        Command::Load { model } => control::load(&args.connection, &model),
        Command::Unload { model, force } => control::unload(&args.connection, &model, force),
        Command::Verify { name, json } => control::verify(&args.connection, &name, json),
        Command::Bench(bench) => bench::run(&args.connection, &bench),
        Command::Doctor { json } => return doctor::run(&args.connection, json),
    };
    exit::code(outcome)
}
