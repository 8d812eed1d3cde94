"""How do the latents of an SAE reach the tools that people look at latents with?

    dashboards      what those tools show of a latent, of one latent after the other
    neuronpedia     as Neuronpedia's API takes them
    saedashboard    as SAEDashboard draws them, and as it hands them to Neuronpedia
    bulk            all latents of an SAE, in files of a batch each

Imported by cli/.
"""
