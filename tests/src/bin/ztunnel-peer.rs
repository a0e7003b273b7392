//! Client and server programs for the pods of the harness. See `ztunnel_tests::peer`.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use ztunnel_tests::peer::{act, crowd, enclosed, first, hold, load, open, serve, stall};

const USAGE: &str = "ztunnel-peer serve <port> | hold <address> | load <rate> <address>... \
     | open <address> <path> <rate> <connections> <seconds> | crowd <address> <path> <connections> \
     | first <address> <path> <seconds> | enclosed <name> | act | stall <address> <path> <connections>";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["serve", port] => serve::serve(port.parse().context("the port")?),
        ["hold", to] => hold::hold(to.parse().context("the address")?),
        ["load", rate, targets @ ..] => {
            let targets: Result<Vec<_>, _> = targets.iter().map(|target| target.parse()).collect();
            load::load(rate.parse().context("the rate")?, &targets.context("an address")?)
        }
        ["open", to, path, rate, connections, seconds] => open::open(&open::Plan {
            to: to.parse().context("the address")?,
            path: (*path).to_owned(),
            rate: rate.parse().context("the rate")?,
            connections: connections.parse().context("the connections")?,
            period: period(seconds)?,
        }),
        ["crowd", to, path, count] => {
            crowd::crowd(to.parse().context("the address")?, path, count.parse().context("the connections")?)
        }
        ["stall", to, path, count] => {
            stall::stall(to.parse().context("the address")?, path, count.parse().context("the connections")?)
        }
        ["first", to, path, seconds] => {
            first::first(to.parse().context("the address")?, path, period(seconds)?)
        }
        ["enclosed", name] => enclosed::enclosed(name),
        ["act"] => act::act(),
        _ => bail!(USAGE),
    }
}

fn period(seconds: &str) -> Result<Duration> {
    Ok(Duration::from_secs(seconds.parse().context("the seconds")?))
}
