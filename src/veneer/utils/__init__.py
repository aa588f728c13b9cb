"""What peft keeps in `peft.utils`, under the same names."""
