"""The house style and the recurring figures."""
