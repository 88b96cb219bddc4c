"""What people look at: arena map, session tree, plots, pages, units. Import the modules."""
