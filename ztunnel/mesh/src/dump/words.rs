//! The words of closed lists, and which of them is meant where none is written.

use std::borrow::Cow;

use crate::model::policy::Action;
use crate::model::policy::Scope;
use crate::model::service::BalanceMode;
use crate::model::service::BalanceScope;
use crate::model::service::HealthPolicy;
use crate::model::service::IpFamilies;
use crate::model::service::Visibility;
use crate::model::workload::ApplicationProtocol;
use crate::model::workload::Reach;
use crate::model::workload::WorkloadKind;

/// What is written as a word.
pub(super) trait Word: Copy + 'static {
    /// All that can be read.
    const ALL: &'static [Self];

    /// The word for it.
    fn word(self) -> &'static str;
}

/// Whose network namespace a workload is in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum NetworkMode {
    Standard,
    HostNetwork,
}

/// Whether a workload may be balanced to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Healthy,
    Unhealthy,
}

macro_rules! words {
    ($($type:ty { $($variant:ident => $word:literal),* $(,)? })*) => {
        $(impl Word for $type {
            const ALL: &'static [Self] = &[$(Self::$variant),*];

            fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),*
                }
            }
        })*
    };
}

words! {
    Reach { Hbone => "HBONE", Plain => "TCP", Unknown => "Unknown" }
    NetworkMode { Standard => "Standard", HostNetwork => "HostNetwork" }
    Status { Healthy => "Healthy", Unhealthy => "Unhealthy" }
    WorkloadKind { Deployment => "deployment", CronJob => "cronjob", Pod => "pod", Job => "job" }
    ApplicationProtocol { None => "NONE", Proxy => "PROXY", Unknown => "UNKNOWN" }
    BalanceScope {
        Network => "Network",
        Region => "Region",
        Zone => "Zone",
        Subzone => "Subzone",
        Node => "Node",
        Cluster => "Cluster",
        Unknown => "Unknown",
    }
    BalanceMode { Any => "Standard", Strict => "Strict", Failover => "Failover", Passthrough => "Passthrough" }
    HealthPolicy { OnlyHealthy => "OnlyHealthy", AllowAll => "AllowAll" }
    IpFamilies { Dual => "Dual", V4Only => "IPv4", V6Only => "IPv6" }
    Visibility { Public => "Public", Namespace => "Namespace" }
    Scope { Global => "Global", Namespace => "Namespace", WorkloadSelector => "WorkloadSelector" }
    Action { Allow => "Allow", Deny => "Deny" }
}

pub(super) fn tcp() -> Cow<'static, str> {
    Cow::Borrowed(Reach::Plain.word())
}

/// The mode of a network as of a balancer.
pub(super) fn standard() -> Cow<'static, str> {
    Cow::Borrowed(NetworkMode::Standard.word())
}

pub(super) fn deployment() -> Cow<'static, str> {
    Cow::Borrowed(WorkloadKind::Deployment.word())
}

pub(super) fn is_deployment(kind: &str) -> bool {
    kind == WorkloadKind::Deployment.word()
}

pub(super) fn healthy() -> Cow<'static, str> {
    Cow::Borrowed(Status::Healthy.word())
}

pub(super) fn only_healthy() -> Cow<'static, str> {
    Cow::Borrowed(HealthPolicy::OnlyHealthy.word())
}

pub(super) fn public() -> Cow<'static, str> {
    Cow::Borrowed(Visibility::Public.word())
}

pub(super) fn one() -> u32 {
    1
}
