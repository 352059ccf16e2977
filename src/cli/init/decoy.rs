//! `valetkey init decoy`: prints one decoy of a credential.

use clap::ValueEnum;

use crate::cli::Typed;
use crate::cli::output::{self, Failure};
use crate::credential::CredentialName;
use crate::decoy::{self, Shape, Tag};

/// What `init decoy` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The credential that the proxy puts in its place
    #[arg(value_name = "NAME")]
    credential: CredentialName,

    /// Whose keys it looks like
    #[arg(long, value_enum, default_value = "openai")]
    shape: Whose,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Whose {
    /// sk-…
    Openai,
    /// sk-ant-api03-…
    Anthropic,
    /// ghp_…
    Github,
}

/// The decoy is data; it is another one each time, and all of them are as good.
pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<(), Failure> {
    let config = typed.config()?;
    if !config.credentials.contains_key(&arguments.credential) {
        return Err(output::no_credential(&config, &arguments.credential));
    }
    let shape = match arguments.shape {
        Whose::Openai => Shape::OpenAi,
        Whose::Anthropic => Shape::Anthropic,
        Whose::Github => Shape::GitHub,
    };
    output::data(decoy::key(Tag::of(&arguments.credential), shape));
    Ok(())
}
