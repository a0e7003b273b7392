//! How many threads move bytes.

use crate::config::env::reader::Reader;
use crate::config::origin::Origin;

const NAME: &str = "ZTUNNEL_WORKER_THREADS";

/// As many as `ZTUNNEL_WORKER_THREADS` says (a number, a percentage of the cores, 0 for all of them), or else
/// `concurrency`, or else the processor limit, or else a quarter of the cores, at least what was requested and
/// two.
pub(super) fn read(reader: &mut Reader<'_>, machine: usize) -> usize {
    let visible = reader.cores("ZTUNNEL_CPU_LIMIT").filter(|cores| *cores > 0);
    let cores = visible.unwrap_or(machine).max(1);
    let limit = reader.cores("ZTUNNEL_RESOURCE_CPU_LIMIT").filter(|cores| *cores > 0);
    let request = reader.cores("ZTUNNEL_RESOURCE_CPU_REQUEST").unwrap_or(0);
    let (threads, origin) = match (reader.set(NAME), reader.proxy.concurrency) {
        (Some(text), _) => match said(text, cores) {
            Some(threads) => (threads, Origin::Environment),
            None => {
                reader.refuse(
                    NAME,
                    text,
                    "use a number, a percentage of the cores such as 25%, or 0 for all cores",
                );
                (1, Origin::Environment)
            }
        },
        (None, Some((0, origin))) => (cores, origin),
        (None, Some((threads, origin))) => (threads, origin),
        (None, None) => match limit {
            Some(limit) => (limit.max(request), Origin::Variable("ZTUNNEL_RESOURCE_CPU_LIMIT")),
            None if request > cores.div_ceil(4).max(2) => {
                (request, Origin::Variable("ZTUNNEL_RESOURCE_CPU_REQUEST"))
            }
            None => (cores.div_ceil(4).max(2), Origin::Machine),
        },
    };
    reader.show(NAME, threads, origin);
    threads
}

/// More threads than any machine has cores are a mistake.
const MAX: usize = 4096;

fn said(text: &str, cores: usize) -> Option<usize> {
    match text.trim().strip_suffix('%') {
        Some(percent) => {
            let percent =
                percent.trim_end().parse::<usize>().ok().filter(|percent| (1..=100).contains(percent))?;
            Some((cores * percent).div_ceil(100).max(1))
        }
        None => match text.trim().parse().ok().filter(|threads| *threads <= MAX)? {
            0 => Some(cores),
            threads => Some(threads),
        },
    }
}
