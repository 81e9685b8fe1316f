"""What the papers define: losses, frame weighting, alignment, projectors."""
