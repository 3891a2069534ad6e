"""Operations: commands, diagrams and documents of a running or a written system."""
