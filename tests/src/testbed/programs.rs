//! The programs in the pods.

use std::fs;
use std::path::Path;

use anyhow::Result;

use super::{HTTP, LARGE_MIB, LINES};
use crate::binaries;
use crate::process::Process;
use crate::topology::Pod;

/// nginx on port 8080 of both families. Each answer says who asked and repeats a marker; `/via` is answered with what
/// a proxy on the way has added to the request, `/large` with zeros.
pub(super) fn nginx(pod: &Pod, directory: &Path) -> Result<Process> {
    let own = directory.join(format!("nginx-{}", pod.name));
    fs::create_dir_all(&own)?;
    // A hole: it takes no space.
    fs::File::create(own.join("large"))?.set_len(LARGE_MIB << 20)?;
    let path = own.join("nginx.conf");
    fs::write(&path, config(&pod.name, &own.display().to_string()))?;
    let mut command = pod.place.command("nginx")?;
    command.arg("-c").arg(&path).arg("-p").arg(&own);
    pod.place.start(&format!("nginx-{}", pod.name), command)
}

fn config(name: &str, directory: &str) -> String {
    format!(
        "daemon off;
# One process, so that none is left when the run is killed.
master_process off;
pid {directory}/pid;
error_log stderr warn;
user root;
worker_rlimit_nofile 65536;
events {{ worker_connections 24000; }}
http {{
  access_log off;
  default_type text/plain;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  server {{
    listen {HTTP} backlog=4096;
    listen [::]:{HTTP} backlog=4096;
    location /large {{ root {directory}; }}
    location /via {{ return 200 \"pod={name} client=$remote_addr via=$http_x_via\\n\"; }}
    location / {{ return 200 \"pod={name} client=$remote_addr marker=$arg_marker\\n\"; }}
  }}
}}
"
    )
}

/// Our own line server, for connections that stay open.
pub(super) fn line_server(pod: &Pod) -> Result<Process> {
    let mut command = pod.place.command(binaries::peer()?)?;
    command.args(["serve", &LINES.to_string()]);
    pod.place.start(&format!("lines-{}", pod.name), command)
}
