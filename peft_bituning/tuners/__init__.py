"""PEFT methods, one room each, built alike."""
