//! Client and server programs for the pods of the harness. See `ztunnel_tests::peer`.

use anyhow::{Context, Result, bail};
use ztunnel_tests::peer::{hold, load, serve};

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
        _ => bail!("ztunnel-peer serve <port> | hold <address> | load <rate> <address>..."),
    }
}
