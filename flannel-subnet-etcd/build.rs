//! Says what to install where `protoc` is missing, before the etcd client's own build fails at it.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "cargo talks to build scripts by environment and output"
)]

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const INSTALL: &str = "building flannel-subnet-etcd (the feature `etcd` of flannel) needs protoc \
    and its well-known types: on Debian `apt-get install protobuf-compiler libprotobuf-dev`, or \
    set PROTOC to the program and PROTOC_INCLUDE to the folder of its google/protobuf/*.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=PROTOC");
    println!("cargo::rerun-if-env-changed=PROTOC_INCLUDE");
    println!("cargo::rerun-if-env-changed=PATH");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    if let Some(problem) = try_protoc(&out)? {
        println!("cargo::error={problem}");
        println!("cargo::error={INSTALL}");
    }
    Ok(())
}

/// Compiles a file that imports what the etcd client's files import; what went wrong, if anything.
fn try_protoc(out: &Path) -> Result<Option<String>, Box<dyn Error>> {
    fs::write(
        out.join("probe.proto"),
        "syntax = \"proto3\";\n\
         import \"google/protobuf/descriptor.proto\";\n\
         import \"google/protobuf/struct.proto\";\n",
    )?;
    let program = env::var_os("PROTOC").unwrap_or_else(|| "protoc".into());
    let mut command = Command::new(&program);
    command.arg("--proto_path").arg(out);
    if let Some(include) = env::var_os("PROTOC_INCLUDE") {
        command.arg("--proto_path").arg(include);
    }
    let mut set = OsString::from("--descriptor_set_out=");
    set.push(out.join("probe.bin"));
    let done = command.arg(set).arg("probe.proto").output();
    Ok(match done {
        Err(error) => Some(format!("{} cannot be run: {error}", program.display())),
        Ok(done) if !done.status.success() => {
            let said = String::from_utf8_lossy(&done.stderr);
            let last = said.lines().find(|line| !line.contains("warning"));
            let last = last.unwrap_or("it said nothing").to_owned();
            Some(format!("{} failed: {last}", program.display()))
        }
        Ok(_) => None,
    })
}
