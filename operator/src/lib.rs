//! Reconciles VicunaTraining and VicunaServing and coordinates the ranks of a training
