"""KSI as a server of the Model Context Protocol: tools by which agents ask, wait, look and lock themselves."""
