//! The budget: how many instructions an event costs, by stage, whatever else the machine does.
//!
//! [`drain`] lets a real relay and a real agent drain a topic under valgrind's callgrind, which counts the instructions of each
//! function; [`callgrind`] reads its files, [`frames`] finds the functions that the compiler put into others, [`rules`] says
//! whose they are and [`attribute`] adds up; [`table`] prints. Two drains of different length are subtracted from each
//! other, so that starting and ending count nothing. [`flame`] draws what a sampling profiler saw.

pub mod attribute;
pub mod callgrind;
pub mod drain;
pub mod flame;
pub mod frames;
pub mod rules;
pub mod table;
