//! `istioctl analyze`: what is wrong, dangerous or without effect in a cluster, in files, or in the cluster that applying the files
//! would give.
//!
//! What is looked for is `translate::analyze`'s; here objects are read ([`collect`]) and findings are chosen and printed, in istioctl's form
//! and with its exit codes.

mod collect;
mod print;

use std::path::PathBuf;

use anyhow::{Result, bail};
use mantlet_api::diagnostic::Severity;
use mantlet_translate::analyze::{self, Finding, Input, Origin, Resource, table};

use crate::files::{self, Document};
use crate::inspect;
use crate::validate;

/// Exit code when findings reach the failure threshold.
const FOUND: u8 = 79;

/// Arguments of `analyze`.
#[derive(Clone, Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "one per flag of istioctl")]
pub struct Args {
    /// Files and directories to analyse, with the cluster they would be applied to; `-` is standard input
    files: Vec<PathBuf>,
    /// Namespace to analyse; by default that of the kubeconfig context
    #[arg(short, long)]
    namespace: Option<String>,
    /// Analyse all namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
    /// Read the cluster too; with `--use-kube=false` only the files
    #[arg(short = 'k', long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set)]
    use_kube: bool,
    /// Go into directories below the given ones
    #[arg(short = 'R', long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set)]
    recursive: bool,
    /// Messages left out, as `CODE=Kind name.namespace`, with `*` for any text; may be repeated
    #[arg(short = 'S', long)]
    suppress: Vec<String>,
    /// Least weight that makes the command fail (exit code 79)
    #[arg(long, value_enum, ignore_case = true, default_value = "Error")]
    failure_threshold: Level,
    /// Least weight that is printed
    #[arg(long, value_enum, ignore_case = true, default_value = "Info")]
    output_threshold: Level,
    /// Format
    #[arg(short, long, value_enum, default_value = "log")]
    output: print::Format,
    /// List the analyzers
    #[arg(short = 'L', long)]
    list_analyzers: bool,
    /// Explain a message by its number
    #[arg(long, value_name = "CODE")]
    explain: Option<String>,
    /// Namespace of the control plane
    #[arg(short = 'i', long = "istioNamespace", default_value = "istio-system")]
    istio_namespace: String,
    /// File with the mesh configuration, instead of the ConfigMap
    #[arg(long = "meshConfigFile")]
    mesh_config_file: Option<PathBuf>,
    /// Colours; accepted for compatibility, output has none
    #[arg(long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set, hide = true)]
    color: bool,
    /// Accepted for compatibility: files of other kinds in directories are left out anyway
    #[arg(long, hide = true)]
    ignore_unknown: bool,
    /// Also say what was read
    #[arg(short, long)]
    verbose: bool,
}

/// Weights, by istioctl's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "PascalCase")]
enum Level {
    Info,
    Warning,
    Error,
}

impl From<Level> for Severity {
    fn from(level: Level) -> Severity {
        match level {
            Level::Info => Severity::Info,
            Level::Warning => Severity::Warning,
            Level::Error => Severity::Error,
        }
    }
}

/// What is printed, and the exit code.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// For standard output.
    pub text: String,
    /// For standard error.
    pub errors: String,
    /// Exit code.
    pub code: u8,
}

impl Answer {
    fn plain(text: String) -> Answer {
        Answer {
            text,
            errors: String::new(),
            code: 0,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// Files that cannot be found, no cluster where one is asked for, an unknown code.
pub fn run(args: &Args) -> Result<Answer> {
    if args.list_analyzers {
        return Ok(Answer::plain(print::analyzers()));
    }
    if let Some(code) = &args.explain {
        let Some(message) = table::find(code) else {
            bail!("no message has the number {code}; docs/messages.md lists them all");
        };
        return Ok(Answer::plain(print::explanation(message)));
    }
    let suppressed: Vec<(String, String)> = args.suppress.iter().map(|s| suppression(s)).collect::<Result<_>>()?;
    if !args.use_kube && args.files.is_empty() {
        bail!("nothing to analyse: name files, or leave --use-kube=false away");
    }
    let texts = Files::read(&args.files, args.recursive)?;
    if !args.use_kube {
        let namespace = args.namespace.as_deref().unwrap_or("default");
        let resources = texts.resources(namespace);
        let input = Input::new(
            mesh_file(args)?.into_iter().chain(resources),
            &args.istio_namespace,
            false,
        );
        let only = args.namespace.as_deref().filter(|_| !args.all_namespaces);
        return finish(args, &texts, &input, Vec::new(), only, &suppressed);
    }
    inspect::ask(async |mesh| {
        let namespace = args.namespace.clone().unwrap_or_else(|| mesh.namespace.clone());
        let mut collected = collect::cluster(&mesh.client, &args.istio_namespace).await;
        collected.resources.extend(mesh_file(args)?);
        collected.resources.extend(texts.resources(&namespace));
        let mut input = Input::new(collected.resources, &args.istio_namespace, true);
        input.secrets = collected.secrets;
        let only = (!args.all_namespaces).then_some(namespace.as_str());
        input.localhost_ports = collect::localhost_ports(&mesh.client, &input, only).await;
        finish(args, &texts, &input, collected.trouble, only, &suppressed)
    })
}

/// The mesh configuration of a file, as the ConfigMap that it would be in.
fn mesh_file(args: &Args) -> Result<Option<Resource>> {
    let Some(path) = &args.mesh_config_file else {
        return Ok(None);
    };
    let texts = files::texts(std::slice::from_ref(path))?;
    let text = texts.into_iter().map(|(_, text)| text).collect::<String>();
    let map = serde_json::json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": mantlet_api::mesh_config::CONFIG_MAP, "namespace": args.istio_namespace},
        "data": {mantlet_api::mesh_config::CONFIG_KEY: text},
    });
    Ok(Resource::read(map, &args.istio_namespace, None))
}

/// The user's files: documents, and texts that are no documents.
struct Files {
    documents: Vec<Document>,
    unreadable: Vec<Finding>,
    names: Vec<String>,
}

impl Files {
    fn read(paths: &[PathBuf], recursive: bool) -> Result<Files> {
        let mut names: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
        names.dedup();
        let paths = if recursive {
            paths.to_vec()
        } else {
            collect::direct(paths)?
        };
        let mut out = Files {
            documents: Vec::new(),
            unreadable: Vec::new(),
            names,
        };
        for chunk in files::chunks(&paths)? {
            match chunk.read() {
                // Objects without a name, most often because their lines lost the indentation, cannot be analysed, only told.
                Ok(documents) if documents.iter().any(|d| !named(&d.value)) => {
                    out.unreadable
                        .extend(validate::findings(std::slice::from_ref(&chunk)).iter().filter_map(told));
                }
                Ok(documents) => out.documents.extend(documents),
                Err(problem) => out.unreadable.push(Finding {
                    message: &table::SYNTAX,
                    kind: String::new(),
                    namespace: String::new(),
                    name: String::new(),
                    origin: Some(Origin {
                        file: problem.file.display().to_string(),
                        document: usize::MAX,
                        line: problem.line,
                    }),
                    path: String::new(),
                    text: problem.message,
                }),
            }
        }
        if out.documents.len() > files::MAX_DOCUMENTS {
            bail!("more than {} objects in the files", files::MAX_DOCUMENTS);
        }
        Ok(out)
    }

    fn resources(&self, namespace: &str) -> Vec<Resource> {
        self.documents
            .iter()
            .enumerate()
            .filter_map(|(index, document)| {
                let origin = Origin {
                    file: document.file.display().to_string(),
                    document: index,
                    line: document.line,
                };
                Resource::read(document.value.clone(), namespace, Some(origin))
            })
            .collect()
    }

    /// `file:line` of a finding.
    fn reference(&self, finding: &Finding) -> Option<String> {
        let origin = finding.origin.as_ref()?;
        let line = self
            .documents
            .get(origin.document)
            .map_or(origin.line, |document| document.position(&finding.path).0);
        Some(format!("{}:{line}", origin.file))
    }
}

/// True for an object that has a name or gets one.
fn named(value: &serde_json::Value) -> bool {
    ["/metadata/name", "/metadata/generateName"].iter().any(|at| {
        value
            .pointer(at)
            .and_then(serde_json::Value::as_str)
            .is_some_and(|name| !name.is_empty())
    })
}

/// A finding of `validate` as one of `analyze`.
fn told(located: &validate::Located) -> Option<Finding> {
    let mut object = located.object.split('/').map(str::to_string);
    Some(Finding {
        message: table::find(located.finding.code.0)?,
        kind: object.next()?,
        namespace: object.next()?,
        name: object.next()?,
        origin: Some(Origin {
            file: located.file.clone(),
            document: usize::MAX,
            line: located.line,
        }),
        path: located.finding.path.clone(),
        text: located.finding.full(),
    })
}

/// Chooses, prints, and decides about the exit code.
fn finish(
    args: &Args,
    texts: &Files,
    input: &Input,
    trouble: Vec<Finding>,
    only: Option<&str>,
    suppressed: &[(String, String)],
) -> Result<Answer> {
    let mut findings = texts.unreadable.clone();
    findings.extend(trouble);
    findings.extend(analyze::analyze(input));
    findings.retain(|f| {
        let here = match only {
            None => true,
            Some(namespace) => {
                f.namespace == namespace || (f.namespace.is_empty() && (f.kind != "Namespace" || f.name == namespace))
            }
        };
        here && !suppressed
            .iter()
            .any(|(code, name)| code == f.message.code && names(name, f))
    });
    let failed = findings
        .iter()
        .any(|f| f.message.level >= Severity::from(args.failure_threshold));
    findings.retain(|f| f.message.level >= Severity::from(args.output_threshold));
    let lines: Vec<print::Line> = findings
        .iter()
        .map(|f| print::Line::new(f, texts.reference(f)))
        .collect();
    let target = match (args.files.is_empty(), only) {
        (false, _) if !args.use_kube => texts.names.join("\n"),
        (_, Some(namespace)) => format!("namespace: {namespace}"),
        (_, None) => "all namespaces".to_string(),
    };
    let mut errors = String::new();
    if !input.secrets {
        errors.push_str("Secrets may not be read by you; credentials of gateways were not looked at.\n");
    }
    if args.verbose {
        errors.push_str(&format!("Analyzed {} objects.\n", input.resources.len()));
    }
    if lines.is_empty() && args.output == print::Format::Log && !failed {
        errors.push_str(&format!(
            "\u{2714} No validation issues found when analyzing {target}.\n"
        ));
    }
    if failed {
        errors.push_str(&format!(
            "Error: Analyzers found issues when analyzing {target}.\nSee {} for more information about causes and resolutions.\n",
            print::documentation()
        ));
    }
    Ok(Answer {
        text: print::all(&lines, args.output)?,
        errors,
        code: if failed { FOUND } else { 0 },
    })
}

/// Reads `CODE=Kind name`.
fn suppression(text: &str) -> Result<(String, String)> {
    let Some((code, name)) = text.split_once('=') else {
        bail!("{text:?} is no suppression; write CODE=Kind name.namespace, for example IST0102=Namespace default");
    };
    let code = code.trim().to_ascii_uppercase();
    if table::find(&code).is_none() {
        bail!("no message has the number {code}; docs/messages.md lists them all");
    }
    Ok((code, name.trim().to_string()))
}

/// Whether a suppression's name means the object of a finding: `Kind namespace/name` or `Kind name.namespace`, `*` for any text.
fn names(pattern: &str, finding: &Finding) -> bool {
    let dotted = format!("{} {}.{}", finding.kind, finding.name, finding.namespace);
    glob(pattern, &finding.object()) || (!finding.namespace.is_empty() && glob(pattern, &dotted))
}

/// `*` stands for any text.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests;
