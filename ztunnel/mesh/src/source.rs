//! What a source of the mesh and of pods may say, whatever it is: which pods it names ([`pod`]), when what it takes away
//! is believed ([`loss`]), and how it stands ([`status`]).

pub mod loss;
pub mod pod;
pub mod status;
