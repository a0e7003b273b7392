//! How long what has not come yet is waited for.
//!
//! A control plane sends what belongs together in several parts: a workload before the policy it names, an address
//! before the waypoint in front of it. Between two parts the mesh is one that nobody asked for. What is missing then,
//! and only what something else in the mesh names, is waited for, for as long as is said here.

use std::time::Duration;

/// A new connection waits no longer for what is missing: a policy, a waypoint, a service, its own workload. Then it is
/// refused. If by then all has come that is known of, it waits until that is settled: for [`SETTLED_WITHIN`] more at most.
pub const NEW_WITHIN: Duration = Duration::from_secs(2);

/// An open connection is kept no longer while a policy is missing that its workload names. Then it is cut. A policy that
/// comes and goes gives it no more time than it was there: a connection is cut once one was missing for so much longer
/// than none was.
pub const OPEN_WITHIN: Duration = Duration::from_secs(10);

/// Policies have changed, and so have those that workloads name, when no such change has come for so long.
pub const SETTLED_AFTER: Duration = Duration::from_millis(500);

/// Changes of policies that go on for longer are not waited for any more: the mesh counts as it is then.
pub const SETTLED_WITHIN: Duration = Duration::from_secs(1);
